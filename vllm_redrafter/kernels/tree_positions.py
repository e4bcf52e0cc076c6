"""The positions of tree rows: those of their depths, where vLLM counts slots. One program for many rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_redrafter.kernels.launch import Launch

_BLOCK = 128


def tree_positions(
    slots: torch.Tensor,  # [num_logits] int32: whose every row of logits is
    nodes: torch.Tensor,  # [num_logits] int32: which of its request's rows it is
    logits_indices: torch.Tensor,  # [num_logits] int: the row of the batch
    depths: torch.Tensor,  # [max_num_requests, 1 + N] int64: of the trees, by slot
    positions: torch.Tensor,  # [num_rows] int64: those of slots; changed
) -> None:
    """Let the rows of trees have the positions of their depths."""
    plan(slots, nodes, logits_indices, depths, positions).run()


def plan(
    slots: torch.Tensor,
    nodes: torch.Tensor,
    logits_indices: torch.Tensor,
    depths: torch.Tensor,
    positions: torch.Tensor,
) -> Launch:
    """Return the launch of `tree_positions`."""
    num_logits = len(logits_indices)
    return Launch(
        _position_kernel,
        (triton.cdiv(num_logits, _BLOCK),),
        {
            "slots": slots,
            "nodes": nodes,
            "logits_indices": logits_indices,
            "depths": depths,
            "positions": positions,
            "num_logits": num_logits,
            "depths_stride": depths.stride(0),
            "BLOCK": _BLOCK,
        },
    )


# every batch has another number of rows
@triton.jit(do_not_specialize=["num_logits"])
def _position_kernel(
    slots,
    nodes,
    logits_indices,
    depths,
    positions,
    num_logits,
    depths_stride,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < num_logits
    slot = tl.load(slots + index, mask=exists, other=0).to(tl.int64)
    node = tl.load(nodes + index, mask=exists, other=0).to(tl.int64)
    row = tl.load(logits_indices + index, mask=exists, other=0)
    depth = tl.load(depths + slot * depths_stride + node, mask=exists, other=0)
    position = tl.load(positions + row, mask=exists, other=0)
    tl.store(positions + row, position + depth - node, mask=exists)
