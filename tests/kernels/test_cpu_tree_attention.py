"""The CPU's tree attention is that of its twin in torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vllm_redrafter.bench.tree_batches import Batch, random_batch
from vllm_redrafter.kernels import cpu_tree_attention, reference
from vllm_redrafter.kernels.batch import AttentionOptions

# fp32 sums in another order: some units in the last place of values of order 1
FP32 = {"rtol": 1e-5, "atol": 3e-6}


def batch_of(contexts: list[int], rows: list[int], block_size: int = 32, **options: Any) -> Batch:
    return random_batch(contexts, rows, block_size=block_size, **options)


def as_vllm_lays_out(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return copies in which a head has its keys as [head_size, block_size], its values as [block_size, head_size]."""
    both = torch.stack((keys.permute(0, 2, 3, 1).flatten(2), values.transpose(1, 2).flatten(2)), dim=2)
    num_blocks, block_size, num_kv_heads, head_size = keys.shape
    return (
        both[:, :, 0].view(num_blocks, num_kv_heads, head_size, block_size).permute(0, 3, 1, 2),
        both[:, :, 1].view(num_blocks, num_kv_heads, block_size, head_size).transpose(1, 2),
    )


def options_for(query: torch.Tensor, **options: Any) -> AttentionOptions:
    return AttentionOptions(query.shape[-1] ** -0.5, **options)


def attend(batch: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what kernel and twin wrote to outputs that were NaN."""
    query, keys, values, trees = batch.inputs
    attention = options_for(query, **options)
    ours, expected = torch.full_like(query, math.nan), torch.full_like(query, math.nan)
    cpu_tree_attention.tree_attention(query, *as_vllm_lays_out(keys, values), trees, attention, ours)
    reference.tree_attention(*batch.inputs, attention, expected)
    return ours, expected


def assert_same(batch: Batch, **options: Any) -> None:
    ours, expected = attend(batch, **options)

    num_rows = int(batch.trees.query_start_loc[-1])
    assert not expected[:num_rows].isnan().any()
    torch.testing.assert_close(ours[:num_rows], expected[:num_rows], **FP32)
    assert ours[num_rows:].isnan().all()


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1), (14, 2)], ids=str)
def test_heads(heads: tuple[int, int]) -> None:
    assert_same(batch_of([37, 32, 3], [5, 7, 2], num_heads=heads[0], num_kv_heads=heads[1]))


@pytest.mark.parametrize("head_size", [32, 64, 96, 128, 256])
def test_head_sizes(head_size: int) -> None:
    assert_same(batch_of([37, 70], [5, 3], head_size=head_size))


@pytest.mark.parametrize("block_size", [32, 64, 96, 128])
def test_trees_that_end_before_at_and_behind_a_block(block_size: int) -> None:
    rows = 6
    contexts = [block_size - rows - 1, block_size - rows, block_size - 1, block_size]
    assert_same(batch_of(contexts, [rows] * 4, block_size=block_size))


def test_an_empty_context() -> None:
    assert_same(batch_of([0, 0], [7, 1]))


@pytest.mark.parametrize("num_nodes", [0, 1, 31, 32, 62, 63])
def test_trees_of_so_many_nodes(num_nodes: int) -> None:
    assert_same(batch_of([41], [1 + num_nodes], num_heads=2, num_kv_heads=1))


def test_requests_with_fewer_rows_or_none() -> None:
    assert_same(batch_of([30, 12, 0, 45], [5, 0, 0, 2], max_rows=9))


def test_many_requests_of_different_sizes() -> None:
    assert_same(batch_of(list(range(0, 120, 3)), [1 + index * 7 % 23 for index in range(40)]))


def test_what_others_left_in_slots_behind_a_request_is_not_seen() -> None:
    batch = batch_of([37, 30], [5, 1])

    assert_same(batch._replace(cache=batch.cache.nan_to_num(nan=3.0)))


def test_rows_of_padding_become_zero() -> None:
    batch = batch_of([300, 17], [6, 6])
    batch.trees.ancestors[:, 4:] = 0

    ours, expected = attend(batch)

    torch.testing.assert_close(ours[:12], expected[:12], **FP32)
    assert (ours[4:6] == 0).all()
    assert (ours[:4] != 0).all()


@pytest.mark.parametrize("num_threads", [1, 5, 16, 64])
def test_a_context_divided_among_threads(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    splits = cpu_tree_attention._num_splits(3, 2005)

    assert splits == {1: 1, 5: 2, 16: 3, 64: 3}[num_threads]
    assert_same(batch_of([2000, 0, 130], [5, 3, 4], num_kv_heads=1, max_rows=8))


@pytest.mark.parametrize("window", [1, 3, 40, 64, 1000])
def test_a_sliding_window_counts_depths(window: int) -> None:
    assert_same(batch_of([100, 2, 64], [9, 9, 1]), sliding_window=window)


def test_a_window_over_a_divided_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)

    assert_same(batch_of([2000, 700], [5, 3], num_kv_heads=1), sliding_window=600)


def test_a_soft_cap() -> None:
    assert_same(batch_of([100, 31], [9, 4]), soft_cap=1.5)


def test_scores_far_apart() -> None:
    batch = batch_of([200], [6])
    batch.query.mul_(300)  # most weights vanish, and the highest score rises block after block

    assert_same(batch)


def test_queries_may_be_a_part_of_a_larger_row() -> None:
    batch = batch_of([50], [6])
    inside = torch.randn(len(batch.query), 9, 64)
    inside[:, 2:6] = batch.query

    assert_same(batch._replace(query=inside[:, 2:6]))


def test_a_rows_output_does_not_depend_on_other_requests() -> None:
    batch = batch_of([100, 40], [9, 4])
    together, _ = attend(batch)

    alone, _ = attend(
        batch._replace(
            trees=batch.trees._replace(
                block_table=batch.trees.block_table[:1],
                query_start_loc=batch.trees.query_start_loc[:2],
                seq_lens=batch.trees.seq_lens[:1],
                ancestors=batch.trees.ancestors[:1],
            )
        )
    )

    assert torch.equal(alone[:9], together[:9])


def test_a_request_of_more_rows_than_words_is_left_alone() -> None:
    batch = batch_of([30, 12, 45], [5, 9, 4], max_rows=9)
    expected, _ = attend(batch)
    narrow = batch._replace(trees=batch.trees._replace(ancestors=batch.trees.ancestors[:, :5]))
    query, keys, values, trees = narrow.inputs
    ours = torch.full_like(query, math.nan)

    cpu_tree_attention.tree_attention(query, *as_vllm_lays_out(keys, values), trees, options_for(query), ours)

    assert ours[5:14].isnan().all()
    assert torch.equal(ours[:5], expected[:5])
    assert torch.equal(ours[14:18], expected[14:18])


def test_what_does_not_fit_is_refused() -> None:
    query, keys, values, trees = batch_of([30], [4]).inputs
    caches = as_vllm_lays_out(keys, values)
    options, out = options_for(query), torch.empty_like(query)

    def call(query: torch.Tensor = query, caches: Any = caches, out: torch.Tensor = out) -> None:
        cpu_tree_attention.tree_attention(query, *caches, trees, options, out)

    call()
    with pytest.raises(ValueError, match=r"keys are torch\.bfloat16"):
        call(caches=(keys.bfloat16(), values))
    with pytest.raises(ValueError, match="not made of whole panels"):
        call(caches=(keys[..., :8], values[..., :8]))
    with pytest.raises(ValueError, match="keys with contiguous positions"):
        call(caches=(keys, values))
    for wrong in (query.bfloat16(), query[:, :3], query[:3], query[..., :32], query.transpose(1, 2).contiguous().mT):
        with pytest.raises(ValueError, match=r"pass \[at least 4, a multiple of 2, 64\] fp32"):
            call(query=wrong)
    with pytest.raises(ValueError, match="pass int32"):
        cpu_tree_attention.TreeAttention(trees._replace(seq_lens=trees.seq_lens.long()))
    with pytest.raises(ValueError, match="the outputs contiguous"):
        call(out=torch.empty(len(out), 5, 64)[:, :4])
