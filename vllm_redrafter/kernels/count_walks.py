"""What the walks of a step did, added up on the device by one program, so that counting costs one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_redrafter.kernels.batch import COUNTED
from vllm_redrafter.kernels.launch import Launch

_BLOCK = 16
"""Requests looked at at once."""


def count_walks(
    nodes: torch.Tensor,  # [num_requests, 1 + N] int64: the walks, -1 behind their ends
    parents: torch.Tensor,  # [max_num_requests, 1 + N] int64: of the trees, by slot; -1 at roots and in padding
    slots: torch.Tensor,  # [num_requests] int32
    cu_num_logits: torch.Tensor,  # [num_requests + 1] int32: where a request's rows begin
    sums: torch.Tensor,  # [len(COUNTED) + N] int64: changed
) -> None:
    """Add what the walks of one step did: what `COUNTED` says, then walks that came so deep, by depth."""
    plan(nodes, parents, slots, cu_num_logits, sums).run()


def plan(
    nodes: torch.Tensor, parents: torch.Tensor, slots: torch.Tensor, cu_num_logits: torch.Tensor, sums: torch.Tensor
) -> Launch:
    """Return the launch of `count_walks`."""
    num_requests, max_rows = nodes.shape
    return Launch(
        _count_kernel,
        (1,),
        {
            "nodes": nodes,
            "parents": parents,
            "slots": slots,
            "cu_num_logits": cu_num_logits,
            "sums": sums,
            "num_requests": num_requests,
            "nodes_stride": nodes.stride(0),
            "parents_stride": parents.stride(0),
            "NUM_COUNTED": len(COUNTED),
            "MAX_ROWS": max_rows,
            "PADDED_ROWS": triton.next_power_of_2(max_rows),
            "BLOCK": _BLOCK,
        },
    )


# every batch has another number of requests
@triton.jit(do_not_specialize=["num_requests"])
def _count_kernel(
    nodes,
    parents,
    slots,
    cu_num_logits,
    sums,
    num_requests,
    nodes_stride,
    parents_stride,
    NUM_COUNTED: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.arange(0, PADDED_ROWS)[None, :]
    num_drafts = tl.zeros([BLOCK], dtype=tl.int64)
    num_verified = tl.zeros([BLOCK], dtype=tl.int64)
    num_branching = tl.zeros([BLOCK], dtype=tl.int64)
    num_truncated = tl.zeros([BLOCK], dtype=tl.int64)
    num_moved = tl.zeros([BLOCK], dtype=tl.int64)
    num_walked = tl.zeros([PADDED_ROWS], dtype=tl.int64)
    for first in range(0, num_requests, BLOCK):
        request = first + tl.arange(0, BLOCK)
        is_request = request < num_requests
        slot = tl.load(slots + request, mask=is_request, other=0).to(tl.int64)
        start = tl.load(cu_num_logits + request, mask=is_request, other=0)
        num_rows = tl.load(cu_num_logits + request + 1, mask=is_request, other=0) - start
        exists = is_request[:, None] & (row < MAX_ROWS)
        parent = tl.load(parents + slot[:, None] * parents_stride + row, mask=exists, other=-1)
        node = tl.load(nodes + request[:, None].to(tl.int64) * nodes_stride + row, mask=exists, other=-1)

        is_node = parent >= 0
        is_verified = is_node & (row < num_rows[:, None])
        verified = tl.sum(is_verified.to(tl.int64), axis=1)
        branching = tl.max((is_verified & (parent != row - 1)).to(tl.int64), axis=1)
        cut = tl.max((is_node & (row >= num_rows[:, None])).to(tl.int64), axis=1)
        num_drafts += (verified > 0).to(tl.int64)
        num_verified += verified
        num_branching += branching
        num_truncated += tl.where(verified > 0, cut, 0)
        num_moved += tl.max((node > row).to(tl.int64), axis=1)
        num_walked += tl.sum((node >= 0).to(tl.int64), axis=0)

    moved = tl.sum(num_moved)
    # in the order of COUNTED
    _add(sums + 0, tl.sum(num_drafts))
    _add(sums + 1, tl.sum(num_verified))
    _add(sums + 2, tl.sum(num_branching))
    _add(sums + 3, tl.sum(num_truncated))
    _add(sums + 4, moved)
    _add(sums + 5, tl.minimum(moved, 1))
    depth = tl.arange(0, PADDED_ROWS)
    by_depth = sums + NUM_COUNTED + depth - 1
    is_deep = (depth > 0) & (depth < MAX_ROWS)
    tl.store(by_depth, tl.load(by_depth, mask=is_deep, other=0) + num_walked, mask=is_deep)


@triton.jit
def _add(place, value):
    tl.store(place, tl.load(place) + value)
