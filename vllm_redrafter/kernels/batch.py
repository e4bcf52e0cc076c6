"""What the kernels are told of a batch and of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

MAX_ROWS = 64
"""Rows of a tree, the root included: as many as a word has bits."""
HEAD_SIZES = (32, 64, 80, 96, 128, 192, 256)
"""Sizes of attention heads that the kernels are made for."""
MAX_BEAMS = 64
"""Beams of a search on the device."""


class TreeBatch(NamedTuple):
    """Trees to verify: row i of a request is node i, and stands in slot `context + i` of the request's KV cache.

    What a CUDA graph must not depend on is in the tensors. A request may have any number of rows up to 1 + N, none
    included: what the scheduler cut off at the end leaves a tree.
    """

    block_table: torch.Tensor  # [num_requests, max_blocks] int32
    query_start_loc: torch.Tensor  # [num_requests + 1] int32: where a request's rows begin
    seq_lens: torch.Tensor  # [num_requests] int32: slots in use, those of the rows included
    ancestors: torch.Tensor  # [num_requests, 1 + N] int64: bit j of word i is set where node i sees node j
    max_seq_len: int
    """An upper bound of `seq_lens`: only how the work is divided depends on it."""

    def check(self) -> None:
        """Refuse tensors that do not fit each other.

        Raises:
            ValueError: they differ in their number of requests, or the trees are too large.
        """
        num_requests, max_rows = self.ancestors.shape
        if not 1 <= max_rows <= MAX_ROWS or self.ancestors.dtype != torch.int64:
            raise ValueError(
                f"ancestors are {self.ancestors.dtype} for {max_rows} rows per tree, but a word of 64 bits holds a "
                f"root and at most {MAX_ROWS - 1} nodes: pass [num_requests, 1 + N] int64"
            )
        of_others = (len(self.block_table), len(self.query_start_loc) - 1, len(self.seq_lens))
        if of_others != (num_requests,) * 3:
            raise ValueError(
                f"block_table, query_start_loc and seq_lens are of {of_others} requests, but ancestors of "
                f"{num_requests}: pass tensors of one batch"
            )


def ancestor_words(parents: Sequence[int]) -> list[int]:
    """Return the word of every node, as the signed 64-bit integer that a tensor holds.

    Args:
        parents: of at most `MAX_ROWS` nodes, those of the roots -1.
    """
    words: list[int] = []
    for row, parent in enumerate(parents):
        words.append((words[parent] if parent >= 0 else 0) | 1 << row)
    return [word - (1 << 64) if word >> 63 else word for word in words]


class PaddedTrees(NamedTuple):
    """One tree of N nodes per request, in a shape that depends on nothing: what a CUDA graph can hold.

    Node 0 is the root, nodes stand before their children and padding stands last, so any prefix is a tree. Padding is
    the root's token again, which is a valid id, with no parent, so that no walk reaches it, and with no ancestors, so
    that its row attends to nothing.
    """

    token_ids: torch.Tensor  # [batch, 1 + N] int64: the root's token first
    parents: torch.Tensor  # [batch, 1 + N] int64: -1 at the root and in padding
    depths: torch.Tensor  # [batch, 1 + N] int64: 0 at the root and in padding
    ancestors: torch.Tensor  # [batch, 1 + N] int64: bit j of word i is set where node i sees node j; 0 in padding


class AttentionOptions(NamedTuple):
    """What a layer's attention is like."""

    scale: float
    """What scores are multiplied by, mostly `head_size ** -0.5`."""
    soft_cap: float = 0.0
    """Scores stay below it; 0 for none."""
    sliding_window: int = 0
    """Positions that a row sees, its own included; 0 for all."""
    k_scale: torch.Tensor | None = None  # [1] fp32: what an fp8 cache's keys are multiplied by
    v_scale: torch.Tensor | None = None  # [1] fp32
