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
COUNTED = (
    "num_drafts",
    "num_draft_tokens",
    "num_branching_trees",
    "num_truncated_trees",
    "num_branch_acceptances",
    "num_commits",
)
"""What `count_walks` sums up, in its order."""


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

    @classmethod
    def zeros(cls, batch_size: int, num_nodes: int, device: torch.device) -> PaddedTrees:
        """Return memory for so many trees."""
        shape = (len(cls._fields), batch_size, 1 + num_nodes)
        return cls(*torch.zeros(shape, dtype=torch.int64, device=device))

    def first(self, batch_size: int) -> PaddedTrees:
        """Return the first trees."""
        return PaddedTrees(*(column[:batch_size] for column in self))


class StepRows(NamedTuple):
    """Which rows of a step are whose, and where the walks ended."""

    slots: torch.Tensor  # [num_requests] int32: the requests', which do not change while they are served
    cu_num_logits: torch.Tensor  # [num_requests + 1] int32: where a request's rows of logits begin
    logits_indices: torch.Tensor  # [num_logits] int: the rows of the batch that have logits
    positions: torch.Tensor  # [max_num_rows] int64: of the rows of the batch, the depth counted and not the slot
    num_sampled: torch.Tensor  # [num_requests] int32: tokens emitted; 0 in the middle of a prompt
    nodes: torch.Tensor | None  # [num_requests, 1 + N] int64: the walks; None where no request had a tree


class RequestStates(NamedTuple):
    """What a draft depends on besides hidden states, by slot."""

    last_sampled: torch.Tensor  # [max_num_requests, 1] int64: the tokens emitted last
    temperatures: torch.Tensor  # [max_num_requests] fp32
    seeds: torch.Tensor  # [max_num_requests] int64
    is_linear: torch.Tensor  # [max_num_requests] int32: requests that get chains
    is_foreseen: torch.Tensor  # [max_num_requests] int32: requests whose noise drafts may know


class DraftStarts(NamedTuple):
    """What a draft reads, by request of the batch, in memory that stays."""

    hidden: torch.Tensor  # [batch, input_size]: the target's last hidden state, and what left the fused layers
    init_ids: torch.Tensor  # [batch] int64: the trees' roots
    is_linear: torch.Tensor  # [batch] bool: requests that get the best path alone
    positions: torch.Tensor  # [batch] int64: the roots'
    temperatures: torch.Tensor  # [batch] fp32: 0 also where the noise is not known
    seeds: torch.Tensor  # [batch] int64

    @classmethod
    def zeros(cls, batch_size: int, input_size: int, dtype: torch.dtype, device: torch.device) -> DraftStarts:
        """Return memory for so many requests."""
        kinds = (torch.int64, torch.bool, torch.int64, torch.float32, torch.int64)
        columns = (torch.zeros(batch_size, dtype=kind, device=device) for kind in kinds)
        return cls(torch.zeros(batch_size, input_size, dtype=dtype, device=device), *columns)

    def first(self, batch_size: int) -> DraftStarts:
        """Return those of the first requests."""
        return DraftStarts(*(column[:batch_size] for column in self))


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
