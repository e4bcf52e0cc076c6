"""The draft vocabulary: the target's tokens that a drafter may propose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_redrafter.training.documents import Document

_WORTH_LEARNING = 0.98
"""Share of what is to be learnt that is kept where no size is asked for: every token of the rest would cost as much, at
every place, as one of these, and is said once in thousands of tokens."""

_SIZE_STEP = 64
"""Sizes that are not asked for are multiples of it: products of such widths are faster."""


class DraftVocabulary(NamedTuple):
    """Tokens of the target that a drafter can say; `d2t` of a checkpoint is made of them."""

    target_ids: torch.Tensor  # [draft_vocab_size] int64, ascending
    coverage: float
    """Share of the tokens to be learnt that it holds; a drafter is wrong wherever one of the others comes."""


def choose_draft_vocabulary(documents: Sequence[Document], size: int | None, vocab_size: int) -> DraftVocabulary:
    """Return the `size` tokens that are most often the target's words in the documents.

    None is for as many as make up 98% of them, so that the size is what the text needs and not what a target knows.

    Between equally frequent ones those win that are more frequent in the whole text, then those with the lower id,
    which most tokenizers give to the more common ones.

    Args:
        vocab_size: rows of the target's output embedding.

    Raises:
        ValueError: the size is out of range, or the documents were not written with the target's vocabulary.
    """
    if size is not None and not 1 <= size <= vocab_size:
        raise ValueError(f"draft_vocab_size is {size}, but it must be from 1 to {vocab_size}, the target's vocab_size")
    if not any(document.is_target.any() for document in documents):
        raise ValueError(f"none of {len(documents)} documents has a token to learn: pass other data")
    num_said = torch.zeros(vocab_size, dtype=torch.int64)
    num_seen = torch.zeros(vocab_size, dtype=torch.int64)
    for document in documents:
        largest = int(document.token_ids.max())
        if largest >= vocab_size:
            raise ValueError(
                f"the data holds token {largest}, but the target has {vocab_size}: use the target's own tokenizer"
            )
        num_seen.index_add_(0, document.token_ids, torch.ones_like(document.token_ids))
        num_said.index_add_(0, document.token_ids, document.is_target.long())
    ranked = num_seen.argsort(descending=True, stable=True)
    ranked = ranked[num_said[ranked].argsort(descending=True, stable=True)]
    if size is None:
        held = num_said[ranked].cumsum(0) / num_said.sum()
        num_needed = int((held < _WORTH_LEARNING).sum()) + 1
        size = -(-num_needed // _SIZE_STEP) * _SIZE_STEP
    target_ids = ranked[:size].sort().values
    return DraftVocabulary(target_ids, float(num_said[target_ids].sum() / num_said.sum()))
