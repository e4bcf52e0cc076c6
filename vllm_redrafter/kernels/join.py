"""Joins the parts of attention whose context was split, each weighted by the sum of weights that it stands for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_redrafter.kernels.launch import Launch


def plan(
    parts: torch.Tensor,  # [num_splits, num_rows, num_heads, head_size] fp32
    lse: torch.Tensor,  # [num_splits, num_rows, num_heads] fp32: log2 of a part's weights, -inf where it has none
    query_start_loc: torch.Tensor,  # [num_requests + 1] int32
    out: torch.Tensor,  # [num_rows, num_heads, head_size]
) -> Launch:
    """Return the launch that writes what the parts make together; 0 where all are without weights."""
    num_splits, num_rows, num_heads, head_size = parts.shape
    padded_splits, padded_head = triton.next_power_of_2(num_splits), triton.next_power_of_2(head_size)
    return Launch(
        _join_kernel,
        (num_rows, num_heads),
        {
            "parts": parts,
            "lse": lse,
            "query_start_loc": query_start_loc,
            "out": out,
            "out_stride_row": out.stride(0),
            "out_stride_head": out.stride(1),
            "num_requests": len(query_start_loc) - 1,
            "num_rows": num_rows,
            "num_splits": num_splits,
            "NUM_HEADS": num_heads,
            "HEAD_SIZE": head_size,
            "PADDED_HEAD": padded_head,
            "PADDED_SPLITS": padded_splits,
        },
        num_warps=8 if padded_splits * padded_head > 2048 else 4,
    )


@triton.jit(do_not_specialize=["num_requests", "num_rows", "num_splits"])
def _join_kernel(
    parts,
    lse,
    query_start_loc,
    out,
    out_stride_row,
    out_stride_head,
    num_requests,
    num_rows,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    if row >= tl.load(query_start_loc + num_requests):
        return
    splits = tl.arange(0, PADDED_SPLITS).to(tl.int64)
    d = tl.arange(0, PADDED_HEAD)
    index = (splits * num_rows + row) * NUM_HEADS + head
    log_totals = tl.load(lse + index, mask=splits < num_splits, other=float("-inf"))
    used = log_totals > float("-inf")
    peak = tl.max(log_totals, axis=0)
    weights = tl.where(used, tl.exp2(log_totals - tl.where(peak > float("-inf"), peak, 0.0)), 0.0)
    values = tl.load(
        parts + index[:, None] * HEAD_SIZE + d[None, :],
        mask=used[:, None] & (d < HEAD_SIZE)[None, :],
        other=0.0,
    )
    total = tl.sum(weights, axis=0)
    joined = tl.sum(values * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(
        out + row * out_stride_row + head * out_stride_head + d,
        joined.to(out.dtype.element_ty),
        mask=d < HEAD_SIZE,
    )
