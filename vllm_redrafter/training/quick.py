"""Training text where none is given: the target goes on from scraps of Python's own documentation.

It is what `train --quick` takes: no file, no download, and text that the target itself would write, greedily and
sampled, which is what a drafter has to foresee.
"""

from __future__ import annotations

import random
import time
from pydoc_data.topics import topics

import torch
from transformers import PreTrainedTokenizerBase

from vllm_redrafter.training.documents import Document
from vllm_redrafter.training.evaluation import as_documents
from vllm_redrafter.training.target import FrozenTarget
from vllm_redrafter.training.transcripts import Transcript, transcribe

SECONDS = 100
"""Time that the target is given to write."""

_OPENING_LENGTH = 16
_ANSWER_LENGTH = 128
_PROMPTS_AT_ONCE = 64


def write_documents(
    target: FrozenTarget, tokenizer: PreTrainedTokenizerBase, seconds: float = SECONDS, seed: int = 0
) -> list[Document]:
    """Return documents of one prompt and answer each, as many as the target writes in about `seconds`."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    token_ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    draw = random.Random(seed)
    written: list[Transcript] = []
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        starts = [draw.randrange(len(token_ids) - _OPENING_LENGTH) for _ in range(_PROMPTS_AT_ONCE)]
        prompts = [
            Transcript(
                torch.cat((token_ids.new_tensor(first), token_ids[start : start + _OPENING_LENGTH])),
                len(first) + _OPENING_LENGTH,
                "python documentation",
            )
            for start in starts
        ]
        half = len(prompts) // 2
        written += transcribe(target, prompts[:half], _ANSWER_LENGTH)
        written += transcribe(target, prompts[half:], _ANSWER_LENGTH, temperature=1.0, seed=len(written))
    # the last tenth is held out: neither kind of text may be missing there
    draw.shuffle(written)
    return as_documents(written)
