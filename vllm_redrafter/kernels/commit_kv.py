"""Moves the keys and values of accepted nodes to the slots that their tokens have in the text.

The i-th accepted node stands in slot `context + node` and belongs into slot `context + i`. Nodes are laid out parents
first, so node >= i: rows move towards the front, and a row that is overwritten may be another's source. A program has
read all of a path's rows, of its part of the heads, before it writes the first. Bytes are moved, whatever they mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_redrafter.kernels.batch import TreeBatch
from vllm_redrafter.kernels.caches import LayerCaches
from vllm_redrafter.kernels.launch import Launch

_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
_TILE = 4096
"""Words that a program holds at once."""


def commit_kv(
    caches: LayerCaches,
    trees: TreeBatch,
    nodes: torch.Tensor,  # [num_requests, 1 + max depth] int64: root, accepted nodes, then -1
) -> None:
    """Let slot `context + i` of every cache hold what slot `context + nodes[:, i]` held.

    A path that lies in place already costs no memory traffic. Requests without rows are left alone.

    Raises:
        ValueError: the tensors are of different batches.
    """
    plan(caches, trees, nodes).run()


def plan(caches: LayerCaches, trees: TreeBatch, nodes: torch.Tensor) -> Launch:
    """Return the launch of `commit_kv`."""
    trees.check()
    num_requests, max_path = nodes.shape
    if num_requests != len(trees.seq_lens):
        raise ValueError(f"nodes are of {num_requests} requests, but trees of {len(trees.seq_lens)}: pass one batch")
    cache = caches.tensors[0]
    num_kv_heads, head_words = cache.shape[2], cache.shape[3] * cache.element_size() // caches.word_bytes
    padded_path = triton.next_power_of_2(max_path)
    block = min(triton.next_power_of_2(num_kv_heads * head_words), _TILE // padded_path)
    return Launch(
        _commit_kernel,
        (num_requests, len(caches.tensors), triton.cdiv(num_kv_heads * head_words, block)),
        {
            "addresses": caches.addresses,
            "block_table": trees.block_table,
            "query_start_loc": trees.query_start_loc,
            "seq_lens": trees.seq_lens,
            "nodes": nodes,
            "block_table_stride": trees.block_table.stride(0),
            "nodes_stride": nodes.stride(0),
            **{
                f"{axis}_words": stride * cache.element_size() // caches.word_bytes
                for axis, stride in zip(("block", "slot", "kv_head"), cache.stride(), strict=False)
            },
            "WORD": _WORDS[caches.word_bytes],
            "BLOCK_SIZE": cache.shape[1],
            "NUM_WORDS": num_kv_heads * head_words,
            "HEAD_WORDS": head_words,
            "MAX_PATH": max_path,
            "PADDED_PATH": padded_path,
            "BLOCK": block,
        },
    )


@triton.jit
def _commit_kernel(
    addresses,
    block_table,
    query_start_loc,
    seq_lens,
    nodes,
    block_table_stride,
    nodes_stride,
    block_words,
    slot_words,
    kv_head_words,
    WORD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    HEAD_WORDS: tl.constexpr,
    MAX_PATH: tl.constexpr,
    PADDED_PATH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    query_len = tl.load(query_start_loc + request + 1) - tl.load(query_start_loc + request)
    context_len = tl.load(seq_lens + request) - query_len
    step = tl.arange(0, PADDED_PATH)
    node = tl.load(nodes + request * nodes_stride + step, mask=step < MAX_PATH, other=-1).to(tl.int32)
    moves = (node > step) & (node < query_len)
    if tl.max(moves.to(tl.int32), axis=0) == 0:
        return

    base = tl.load(addresses + tl.program_id(1)).to(tl.pointer_type(WORD))
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    within = (word // HEAD_WORDS).to(tl.int64) * kv_head_words + word % HEAD_WORDS
    block_row = block_table + request * block_table_stride
    source = context_len + node
    source_block = tl.load(block_row + source // BLOCK_SIZE, mask=moves, other=0).to(tl.int64)
    target = context_len + step
    target_block = tl.load(block_row + target // BLOCK_SIZE, mask=moves, other=0).to(tl.int64)
    source_row = source_block * block_words + (source % BLOCK_SIZE) * slot_words
    target_row = target_block * block_words + (target % BLOCK_SIZE) * slot_words

    mask = moves[:, None] & (word < NUM_WORDS)[None, :]
    rows = tl.load(base + source_row[:, None] + within[None, :], mask=mask)
    # a row that one thread overwrites may be what another reads
    tl.debug_barrier()
    tl.store(base + target_row[:, None] + within[None, :], rows, mask=mask)
