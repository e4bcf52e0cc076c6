"""Random batches of trees over a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_redrafter.kernels.batch import TreeBatch, ancestor_words


class Batch(NamedTuple):
    """Queries of trees, and the cache that they attend to."""

    query: torch.Tensor  # [num_rows, num_heads, head_size]
    cache: torch.Tensor  # [num_blocks, block_size, num_kv_heads, 2 * head_size]: keys, then values
    trees: TreeBatch

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TreeBatch]:
        """What `tree_attention` takes first: queries, keys, values, trees."""
        head_size = self.query.shape[-1]
        return self.query, self.cache[..., :head_size], self.cache[..., head_size:], self.trees


def random_parents(num_rows: int, generator: torch.Generator) -> list[int]:
    """Return a random tree, parents before children; -1 at the root."""
    return [-1, *(int(torch.randint(row, (), generator=generator)) for row in range(1, num_rows))][:num_rows]


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
    device: str = "cpu",
    seed: int = 0,
) -> Batch:
    """Return a batch of random trees whose blocks lie scattered in a cache; slots that nobody wrote are NaN.

    The same on every device, but for the numbers in queries and cache.

    Args:
        context_lens: per request, tokens before the tree.
        query_lens: per request, rows of the tree; 0 for a request without any.
        layout: "NHD", or "HND" where a head's slots lie together.
    """
    of_numbers, of_structure = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)
    seq_lens = [context + rows for context, rows in zip(context_lens, query_lens, strict=True)]
    blocks_of = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(blocks_of) + 3
    max_rows = max_rows or max(query_lens)
    # behind the blocks of a request there is nothing that could be read
    block_table = torch.full((len(seq_lens), max(blocks_of) + 1), -(1 << 30), dtype=torch.int32)
    ancestors = torch.zeros(len(seq_lens), max_rows, dtype=torch.int64)
    free_blocks = iter(torch.randperm(num_blocks, generator=of_structure).tolist())
    for request, count in enumerate(blocks_of):
        block_table[request, :count] = torch.tensor([next(free_blocks) for _ in range(count)])
        words = ancestor_words(random_parents(query_lens[request], of_structure))
        ancestors[request, : len(words)] = torch.tensor(words, dtype=torch.int64)

    inner = (block_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, block_size)
    cache = torch.full((num_blocks, *inner, 2 * head_size), float("nan"), device=device)
    if layout == "HND":
        cache = cache.transpose(1, 2)
    for request, length in enumerate(seq_lens):
        positions = torch.arange(length)
        slots = (block_table[request, positions // block_size].long().to(device), (positions % block_size).to(device))
        cache[slots] = torch.randn(length, num_kv_heads, 2 * head_size, generator=of_numbers, device=device)
    # rows behind the last request's belong to nobody
    query = torch.randn(sum(query_lens) + 2, num_heads, head_size, generator=of_numbers, device=device)
    return Batch(
        query.to(dtype),
        cache.to(dtype),
        TreeBatch(
            block_table.to(device),
            torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device),
            torch.tensor(seq_lens, dtype=torch.int32, device=device),
            ancestors.to(device),
            max(seq_lens),
        ),
    )
