"""Random batches of trees over a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_redrafter.kernels.batch import TreeBatch


class Batch(NamedTuple):
    """What `tree_attention` takes, but for the options and the output."""

    query: torch.Tensor  # [num_rows, num_heads, head_size]
    key_cache: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_size]
    value_cache: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_size]
    trees: TreeBatch


def random_parents(num_rows: int, generator: torch.Generator) -> list[int]:
    """Return a random tree, parents before children; -1 at the root."""
    return [-1, *(int(torch.randint(row, (), generator=generator)) for row in range(1, num_rows))]


def ancestor_words(parents: Sequence[int]) -> list[int]:
    """Return the word of every node, as the signed 64-bit integer that a tensor holds."""
    words: list[int] = []
    for row, parent in enumerate(parents):
        words.append((words[parent] if parent >= 0 else 0) | 1 << row)
    return [word - (1 << 64) if word >> 63 else word for word in words]


def random_batch(
    context_lens: Sequence[int],
    query_lens: Sequence[int],
    *,
    max_rows: int | None = None,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    layout: str = "NHD",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """Return a batch of random trees whose blocks lie scattered in a cache; slots that nobody wrote are NaN."""
    generator = torch.Generator().manual_seed(seed)
    seq_lens = [context + rows for context, rows in zip(context_lens, query_lens, strict=True)]
    blocks_of = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(blocks_of) + 3
    max_rows = max_rows or max(query_lens)
    free = torch.randperm(num_blocks, generator=generator).tolist()
    block_table = torch.full((len(seq_lens), max(blocks_of) + 1), -(1 << 30), dtype=torch.int32)
    # keys and values of a slot lie side by side, as in vLLM; HND stores a head's slots together
    shape = (num_blocks, block_size, num_kv_heads, 2 * head_size)
    cache = torch.full(shape if layout == "NHD" else (shape[0], shape[2], shape[1], shape[3]), float("nan"))
    if layout == "HND":
        cache = cache.transpose(1, 2)
    ancestors = torch.zeros(len(seq_lens), max_rows, dtype=torch.int64)
    for request, (length, rows) in enumerate(zip(seq_lens, query_lens, strict=True)):
        blocks = torch.tensor(free[: blocks_of[request]], dtype=torch.int32)
        del free[: blocks_of[request]]
        block_table[request, : len(blocks)] = blocks
        positions = torch.arange(length)
        cache[blocks[positions // block_size].long(), positions % block_size] = torch.randn(
            length, num_kv_heads, 2 * head_size, generator=generator
        )
        ancestors[request, :rows] = torch.tensor(
            ancestor_words(random_parents(rows, generator)) if rows else [], dtype=torch.int64
        )
    cache = cache.to(dtype)
    query = torch.randn(sum(query_lens) + 2, num_heads, head_size, generator=generator).to(dtype)
    return Batch(
        query,
        *cache.split(head_size, dim=-1),
        TreeBatch(
            block_table,
            torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            torch.tensor(seq_lens, dtype=torch.int32),
            ancestors,
            max(seq_lens),
        ),
    )
