"""What the nodes of drafted trees are to each other, written to their requests' slots: one program per request."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_redrafter.kernels.batch import PaddedTrees
from vllm_redrafter.kernels.launch import Launch


def store_trees(
    trees: PaddedTrees,  # of a batch, contiguous
    slots: torch.Tensor,  # [batch] int32
    num_sampled: torch.Tensor,  # [batch] int32: 0 where a request is in the middle of its prompt, and has no tree
    kept: PaddedTrees,  # by slot, contiguous; tokens are not kept
) -> None:
    """Write what the nodes of trees are to each other to their slots, or the root alone."""
    plan(trees, slots, num_sampled, kept).run()


def plan(trees: PaddedTrees, slots: torch.Tensor, num_sampled: torch.Tensor, kept: PaddedTrees) -> Launch:
    """Return the launch of `store_trees`."""
    max_rows = trees.parents.shape[1]
    return Launch(
        _store_kernel,
        (len(slots),),
        {
            "parents": trees.parents,
            "depths": trees.depths,
            "ancestors": trees.ancestors,
            "slots": slots,
            "num_sampled": num_sampled,
            "kept_parents": kept.parents,
            "kept_depths": kept.depths,
            "kept_ancestors": kept.ancestors,
            "MAX_ROWS": max_rows,
            "PADDED_ROWS": triton.next_power_of_2(max_rows),
        },
        num_warps=1,
    )


@triton.jit
def _store_kernel(
    parents,
    depths,
    ancestors,
    slots,
    num_sampled,
    kept_parents,
    kept_depths,
    kept_ancestors,
    MAX_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + request).to(tl.int64)
    row = tl.arange(0, PADDED_ROWS)
    exists = row < MAX_ROWS
    is_node = row < tl.where(tl.load(num_sampled + request) > 0, MAX_ROWS, 1)
    source, target = request * MAX_ROWS + row, slot * MAX_ROWS + row
    tl.store(kept_parents + target, tl.load(parents + source, mask=is_node, other=-1), mask=exists)
    tl.store(kept_depths + target, tl.load(depths + source, mask=is_node, other=0), mask=exists)
    tl.store(kept_ancestors + target, tl.load(ancestors + source, mask=is_node, other=0), mask=exists)
