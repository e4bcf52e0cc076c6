"""Attention of token trees over a paged KV cache.

The rows of a request are its root and nodes, laid out as `core.token_tree` has them; their keys and values are in the
cache already, row i's at position `context + i`. With A_i the set of i's ancestors and i itself, given as the bits of a
64-bit word, row i attends to every position before `context` and to `context + j` for j in A_i:

    out_i = sum_t softmax_t(cap(scale * q_i k_t)) v_t        cap(x) = c tanh(x / c), or x without a soft cap

A row stands at position `context + |A_i| - 1`, its depth: that is what a sliding window is counted from.

One program holds the rows of all query heads that share a KV head, so that a key is read once for all of them, and
walks over its part of the context with an online softmax in base 2. Only the tiles that reach into the tree look at the
words. Where requests alone do not fill the GPU the context is split, and a second kernel joins the parts. The grid
depends on nothing that only the device knows: a CUDA graph that was captured once fits all lengths.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_redrafter.kernels import join, tile
from vllm_redrafter.kernels.batch import HEAD_SIZES, AttentionOptions, TreeBatch
from vllm_redrafter.kernels.gpu import Gpu, gpu_of
from vllm_redrafter.kernels.launch import Launch

_MIN_SPLIT = 256
"""Keys for which a program of its own pays."""
_MAX_SPLITS = 64
_USUAL_LEN = 8192
"""Keys that work is divided for where the bound of a captured graph allows more."""
_START = 3.0
"""What starting and ending a program takes, in tiles of keys: an estimate."""
_BYTES_AHEAD = 48 * 1024
"""Keys and values that should be under way while a program computes: at 4 TB/s and 132 multiprocessors, 30 bytes per
nanosecond for each, that is 1.5 microseconds, about twice what a load takes."""
_MAX_TILES_AHEAD = 3


def tree_attention(
    query: torch.Tensor,  # [num_rows, num_heads, head_size]
    key_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_size], any strides but the last
    value_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_size]
    trees: TreeBatch,
    options: AttentionOptions,
    out: torch.Tensor,  # [num_rows, num_heads, head_size]
) -> None:
    """Write the attention of every tree row to `out`.

    Rows whose word is 0 are padding within a request and become 0; rows that belong to no request stay untouched. An
    fp8 cache is e4m3.

    Raises:
        ValueError: shapes, types or strides do not fit each other.
    """
    for launch in plan(query, key_cache, value_cache, trees, options, out, gpu_of(query.device)):
        launch.run()


def plan(
    query: torch.Tensor,  # [num_rows, num_heads, head_size]
    key_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_size]
    value_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_size]
    trees: TreeBatch,
    options: AttentionOptions,
    out: torch.Tensor,  # [num_rows, num_heads, head_size]
    gpu: Gpu,
) -> list[Launch]:
    """Return the launches of `tree_attention` on a GPU: one, or two where the context is split."""
    trees.check()
    _check(query, key_cache, value_cache, out)
    num_rows, num_heads, head_size = query.shape
    num_kv_heads = key_cache.shape[2]
    num_requests, max_rows = trees.ancestors.shape
    group = num_heads // num_kv_heads
    shape = _tile_shape(max_rows * group, head_size, query.dtype, options.sliding_window > 0, gpu)
    num_warps = _num_warps(shape["BLOCK_M"], head_size)
    num_tiles = triton.cdiv(max_rows * group, shape["BLOCK_M"])
    num_splits = _num_splits(num_requests * num_kv_heads * num_tiles, trees.max_seq_len, shape["BLOCK_KV"], gpu)
    if key_cache.dtype == torch.float8_e4m3fn and gpu.capability < 89:
        # these know no fp8: the kernel decodes the bytes
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)

    parts, part_lse = out[None], None
    if num_splits > 1:
        parts = query.new_empty(num_splits, *query.shape, dtype=torch.float32)
        part_lse = query.new_empty(num_splits, num_rows, num_heads, dtype=torch.float32)
    attend = Launch(
        _attend_kernel,
        (num_tiles * num_splits, num_kv_heads, num_requests),
        {
            "query": query,
            "keys": key_cache,
            "values": value_cache,
            "block_table": trees.block_table,
            "query_start_loc": trees.query_start_loc,
            "seq_lens": trees.seq_lens,
            "ancestors": trees.ancestors,
            "k_scale": options.k_scale,
            "v_scale": options.v_scale,
            "out": parts,
            "lse": part_lse,
            "scale": options.scale,
            **_strides("query", query, "row", "head"),
            **_strides("key", key_cache, "block", "slot", "head"),
            **_strides("value", value_cache, "block", "slot", "head"),
            **_strides("block_table", trees.block_table, "request"),
            **_strides("ancestors", trees.ancestors, "request"),
            **_strides("out", parts, "split", "row", "head"),
            "num_rows": num_rows,
            "num_splits": num_splits,
            "SOFT_CAP": options.soft_cap,
            "WINDOW": options.sliding_window,
            "BLOCK_SIZE": key_cache.shape[1],
            "HEAD_SIZE": head_size,
            "PADDED_HEAD": triton.next_power_of_2(head_size),
            "NUM_HEADS": num_heads,
            "GROUP": group,
            "NUM_TILES": num_tiles,
            **shape,
        },
        num_warps,
        _num_stages(query, key_cache, shape, num_warps, gpu) if query.element_size() == 2 else 1,
    )
    if part_lse is None:
        return [attend]
    return [attend, join.plan(parts, part_lse, trees.query_start_loc, out)]


def _check(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, out: torch.Tensor) -> None:
    num_heads, head_size = query.shape[1:]
    if head_size not in HEAD_SIZES:
        raise ValueError(f"head_size is {head_size}, but the kernel knows {HEAD_SIZES}: use another attention backend")
    if num_heads % key_cache.shape[2] or key_cache.shape[3] != head_size or value_cache.shape != key_cache.shape:
        raise ValueError(
            f"{num_heads} heads of {head_size} do not fit caches of {tuple(key_cache.shape)} and "
            f"{tuple(value_cache.shape)}: pass [num_blocks, block_size, num_kv_heads, head_size] of the same model"
        )
    if out.shape != query.shape or any(tensor.stride(-1) != 1 for tensor in (query, key_cache, value_cache, out)):
        raise ValueError(
            f"query {tuple(query.shape)} and out {tuple(out.shape)} differ, or a head is not contiguous: pass tensors "
            "whose last stride is 1"
        )


def _tile_shape(num_rows: int, head_size: int, dtype: torch.dtype, has_window: bool, gpu: Gpu) -> dict[str, int]:
    """Return how many rows and keys a program handles at once: as many as leave everything in registers."""
    small = head_size > 128 or dtype == torch.float32 or (head_size > 64 and not gpu.has_large_products)
    block_m = min(max(16, triton.next_power_of_2(num_rows)), 64 if small else 128)
    return {"BLOCK_M": block_m, "BLOCK_KV": 32 if small or has_window else 64}


def _num_warps(block_m: int, head_size: int) -> int:
    return 8 if block_m * triton.next_power_of_2(head_size) >= 4096 else 4


def _num_stages(query: torch.Tensor, key_cache: torch.Tensor, shape: dict[str, int], num_warps: int, gpu: Gpu) -> int:
    """Return how deep the loop over tiles is pipelined.

    A load of keys follows a load of their block numbers, and each link of that chain is given half of the stages. With
    three of them, or four, a tile's loads end where the loop waits for them at once; every two more keep another tile
    under way meanwhile (`bench kernels --compile-only` shows it).
    """
    padded_head = triton.next_power_of_2(query.shape[-1])
    tile_bytes = 2 * shape["BLOCK_KV"] * padded_head * key_cache.element_size()
    # the query's rows, and as much again for what is moved between layouts
    others = 2 * shape["BLOCK_M"] * padded_head * query.element_size()
    # one tile is in use, and one being waited for
    fitting = (gpu.shared_bytes - others) // tile_bytes - 2
    # of programs of four warps, two find room
    wanted = triton.cdiv(_BYTES_AHEAD * num_warps, 8 * tile_bytes)
    return 3 + 2 * max(0, min(wanted, _MAX_TILES_AHEAD, fitting))


def _num_splits(num_programs: int, max_seq_len: int, block_kv: int, gpu: Gpu) -> int:
    """Return into how many parts the context is cut: those that all end soonest, in batches even and uneven."""
    tiles = min(max_seq_len, _USUAL_LEN) / block_kv

    def duration(splits: int) -> float:
        part, rounds = tiles / splits, num_programs * splits / gpu.num_multiprocessors
        even = math.ceil(rounds) * (part + _START)
        # half as long on average, in any order, and while the last one runs there is nothing else to do
        uneven = rounds * (part / 2 + _START) + part
        return even + uneven

    most = max(1, min(max_seq_len // _MIN_SPLIT, _MAX_SPLITS))
    return min(range(1, most + 1), key=duration)


def _strides(name: str, tensor: torch.Tensor, *axes: str) -> dict[str, Any]:
    return {f"{name}_stride_{axis}": tensor.stride(index) for index, axis in enumerate(axes)}


# what differs from step to step must not call for another binary
@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _attend_kernel(
    query,
    keys,
    values,
    block_table,
    query_start_loc,
    seq_lens,
    ancestors,
    k_scale,
    v_scale,
    out,
    lse,
    scale,
    query_stride_row,
    query_stride_head,
    key_stride_block,
    key_stride_slot,
    key_stride_head,
    value_stride_block,
    value_stride_slot,
    value_stride_head,
    block_table_stride_request,
    ancestors_stride_request,
    out_stride_split,
    out_stride_row,
    out_stride_head,
    num_rows,
    num_splits,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    row_tile = tl.program_id(0) % NUM_TILES
    split = tl.program_id(0) // NUM_TILES
    kv_head = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    first_row = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - first_row
    if row_tile * BLOCK_M >= query_len * GROUP:
        return
    kv_len = tl.load(seq_lens + request)
    context_len = kv_len - query_len

    # row m of the tile is query head m % GROUP of node m // GROUP
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    nodes = m // GROUP
    heads = kv_head * GROUP + m % GROUP
    rows = (first_row + nodes).to(tl.int64)
    d = tl.arange(0, PADDED_HEAD)
    in_query = nodes < query_len
    in_head = d < HEAD_SIZE
    q = tl.load(
        query + rows[:, None] * query_stride_row + heads[:, None] * query_stride_head + d[None, :],
        mask=in_query[:, None] & in_head[None, :],
        other=0.0,
    )
    words = tl.load(ancestors + request * ancestors_stride_request + nodes, mask=in_query, other=0)
    row_positions = context_len + tile.popcount(words) - 1

    if k_scale is not None:
        scale = scale * tl.load(k_scale)
    block_row = block_table + request * block_table_stride_request
    key_head = keys + kv_head * key_stride_head + d[None, :]
    value_head = values + kv_head * value_stride_head + d[None, :]

    first_tile = 0
    if WINDOW > 0:
        # the root looks back farthest
        first_tile = tl.maximum(context_len - WINDOW + 1, 0) // BLOCK_KV
    last_tile = tl.cdiv(kv_len, BLOCK_KV)
    num_tiles = tl.cdiv(last_tile - first_tile, num_splits)
    begin = first_tile + split * num_tiles
    end = tl.minimum(begin + num_tiles, last_tile)
    tree_tile = context_len // BLOCK_KV

    acc = tl.zeros([BLOCK_M, PADDED_HEAD], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    for index in range(begin, tl.minimum(end, tree_tile)):
        positions = index * BLOCK_KV + tl.arange(0, BLOCK_KV)
        blocks, slots = tile.locate(block_row, positions, kv_len, BLOCK_SIZE)
        k = tile.load(key_head + blocks * key_stride_block + slots * key_stride_slot, positions < kv_len, in_head)
        v = tile.load(value_head + blocks * value_stride_block + slots * value_stride_slot, positions < kv_len, in_head)
        scores = tile.scores(q, k, scale, SOFT_CAP)
        if WINDOW > 0:
            scores = tl.where(row_positions[:, None] - positions[None, :] < WINDOW, scores, float("-inf"))
        acc, total, peak = tile.accumulate(acc, total, peak, scores, v, q.dtype)
    for index in range(tl.maximum(begin, tree_tile), end):
        positions = index * BLOCK_KV + tl.arange(0, BLOCK_KV)
        blocks, slots = tile.locate(block_row, positions, kv_len, BLOCK_SIZE)
        k = tile.load(key_head + blocks * key_stride_block + slots * key_stride_slot, positions < kv_len, in_head)
        v = tile.load(value_head + blocks * value_stride_block + slots * value_stride_slot, positions < kv_len, in_head)
        scores = tile.scores(q, k, scale, SOFT_CAP)
        in_tree = (positions >= context_len) & (positions < kv_len)
        columns = tl.where(in_tree, positions - context_len, 0)
        seen = (words[:, None] >> columns[None, :].to(tl.int64)) & 1
        visible = (positions < context_len)[None, :] | (in_tree[None, :] & (seen != 0))
        if WINDOW > 0:
            column_words = tl.load(ancestors + request * ancestors_stride_request + columns, mask=in_tree, other=0)
            key_positions = tl.where(in_tree, context_len + tile.popcount(column_words) - 1, positions)
            visible &= row_positions[:, None] - key_positions[None, :] < WINDOW
        scores = tl.where(visible, scores, float("-inf"))
        acc, total, peak = tile.accumulate(acc, total, peak, scores, v, q.dtype)

    seen_any = (words != 0) & (total > 0)
    acc = tl.where(seen_any[:, None], acc / tl.where(seen_any, total, 1.0)[:, None], 0.0)
    if v_scale is not None:
        acc *= tl.load(v_scale)
    tl.store(
        out
        + split.to(tl.int64) * out_stride_split
        + rows[:, None] * out_stride_row
        + heads[:, None] * out_stride_head
        + d[None, :],
        acc.to(out.dtype.element_ty),
        mask=in_query[:, None] & in_head[None, :],
    )
    if lse is not None:
        log_total = tl.where(seen_any, peak + tl.log2(tl.where(seen_any, total, 1.0)), float("-inf"))
        tl.store(lse + (split.to(tl.int64) * num_rows + rows) * NUM_HEADS + heads, log_total, mask=in_query)
