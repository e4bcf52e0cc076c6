"""The drafter of the example pair: trained on what the target itself would say, measured with the reference loop."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vllm_redrafter.core.checkpoint import load_drafter
from vllm_redrafter.core.decoding import generate
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.training.documents import Document
from vllm_redrafter.training.evaluation import as_documents
from vllm_redrafter.training.recipe import QUICK
from vllm_redrafter.training.run import train
from vllm_redrafter.training.target import FrozenTarget
from vllm_redrafter.training.transcripts import Transcript, transcribe

SEED = 3
# Openings of several lengths, so that no two texts are alike: what is written twice is learnt by heart.
PROMPT_LENGTHS = (8, 16, 32, 64)
CONTINUATION_LENGTH = 160
TEXTS_AT_ONCE = 64
RECIPE = replace(QUICK, num_evaluations=10, seed=SEED)


def write_texts(
    target: FrozenTarget, sample_prompts: Callable[[int, int], torch.Tensor], num_texts: int
) -> list[Document]:
    """What the target makes of prompts that `sample_prompts(number, length)` draws: half of it greedy, half sampled."""
    written: list[Transcript] = []
    while len(written) < num_texts:
        number = len(written) // TEXTS_AT_ONCE
        length = PROMPT_LENGTHS[number // 2 % len(PROMPT_LENGTHS)]
        prompts = [Transcript(ids, length, "example corpus") for ids in sample_prompts(TEXTS_AT_ONCE, length)]
        written += transcribe(target, prompts, CONTINUATION_LENGTH, temperature=float(number % 2), seed=number)
        print(f"drafter: {len(written)} of {num_texts} texts written", file=sys.stderr, flush=True)
    # the last ones are held out: no kind of text may be missing there
    random.Random(SEED).shuffle(written)
    return as_documents(written)


def make_drafter(
    target: FrozenTarget, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], steps: int, output: Path
) -> ReDrafter:
    """A drafter trained for `steps`, its weights rounded to what bfloat16 can hold; `output` keeps the whole run."""
    recipe = replace(RECIPE, max_steps=steps)
    trained = train(target, tokenizer, documents, output, recipe, verifier="examples/models/target")
    return load_drafter(trained.directory).to(torch.bfloat16).float()


def mean_acceptance_length(
    target: PreTrainedModel,
    drafter: ReDrafter,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    num_nodes: int,
    num_tokens: int,
    temperature: float,
) -> float:
    """Tokens per verification over all prompts, `num_tokens` each; greedy at temperature 0, else sampled."""
    generator = torch.Generator().manual_seed(SEED)

    def sample(logits: torch.Tensor) -> torch.Tensor:
        if temperature == 0:
            return logits.argmax(dim=-1)
        return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)[:, 0]

    accepted: list[int] = []
    for prompt in prompts:
        ids = torch.tensor(tokenizer.encode(prompt))
        accepted += generate(target, drafter, ids, num_tokens, num_nodes=num_nodes, sample=sample).num_accepted
    return 1 + sum(accepted) / len(accepted)
