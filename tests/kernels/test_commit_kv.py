from __future__ import annotations

import pytest
import torch

from vllm_redrafter.bench.tree_batches import Batch, random_batch
from vllm_redrafter.kernels import reference
from vllm_redrafter.kernels.caches import LayerCaches, layer_caches

commit_kv = pytest.importorskip("vllm_redrafter.kernels.commit_kv", reason="needs Triton", exc_type=ImportError)


def layers_of(batch: Batch, num_layers: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Returns caches that differ in every layer, with the batch's strides."""
    layers = []
    for layer in range(num_layers):
        copy = batch.cache.clone()
        copy.copy_(copy.nan_to_num() + layer)
        layers.append(copy.to(dtype))
    return layers


def paths(*nodes: list[int]) -> torch.Tensor:
    """Returns the walks' nodes, padded with -1."""
    width = max(map(len, nodes)) + 1
    return torch.tensor([[0, *path, *[-1] * (width - len(path))] for path in nodes])


def rows_at(cache: torch.Tensor, batch: Batch, request: int, positions: torch.Tensor) -> torch.Tensor:
    blocks = batch.trees.block_table[request, positions // cache.shape[1]].long()
    return cache[blocks, positions % cache.shape[1]]


def assert_committed(caches: list[torch.Tensor], batch: Batch, nodes: torch.Tensor) -> None:
    """Checks kernel and twin against a gather of what was there before, and that nothing else changed."""
    expected = [cache.clone() for cache in caches]
    reference.commit_kv(layer_caches(expected), batch.trees, nodes)
    for before, after in zip(caches, expected, strict=True):
        for request, path in enumerate(nodes.tolist()):
            rows = int(batch.trees.query_start_loc.diff()[request])
            accepted = torch.tensor([node for node in path if 0 <= node < rows], dtype=torch.int64)
            context = int(batch.trees.seq_lens[request]) - rows
            kept = torch.arange(context)
            now = rows_at(after, batch, request, context + torch.arange(len(accepted)))
            assert torch.equal(now, rows_at(before, batch, request, context + accepted))
            assert torch.equal(rows_at(after, batch, request, kept), rows_at(before, batch, request, kept))

    commit_kv.commit_kv(layer_caches(caches), batch.trees, nodes)

    for ours, twin in zip(caches, expected, strict=True):
        assert torch.equal(ours, twin)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accepted_rows_move_to_the_front_of_the_tree(layout: str, dtype: torch.dtype) -> None:
    batch = random_batch([14, 3, 16, 40], [9, 6, 7, 9], layout=layout)
    assert_committed(layers_of(batch, 3, dtype), batch, paths([2, 5, 8], [5], [1, 2, 3], []))


def test_a_row_may_be_the_source_of_one_move_and_the_target_of_another() -> None:
    # slot 2 takes what slot 3 held, and slot 3 what slot 4 held, and so on
    batch = random_batch([13], [9])
    assert_committed(layers_of(batch, 2), batch, paths([1, 3, 4, 5, 6, 7, 8]))


def test_fp8_rows_are_moved_as_bytes() -> None:
    batch = random_batch([14], [9])
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(batch.cache.numel())
    caches = [torch.empty(batch.cache.shape, dtype=torch.uint8) for _ in range(2)]
    for shift, cache in enumerate(caches):
        cache.copy_(every_byte[shift : shift + cache.numel()].view(cache.shape))

    assert_committed(caches, batch, paths([2, 4, 7]))


@pytest.mark.parametrize(("head_size", "word_bytes"), [(64, 8), (2, 4), (3, 2)])
def test_words_are_as_wide_as_addresses_and_rows_allow(head_size: int, word_bytes: int) -> None:
    batch = random_batch([14], [5], head_size=head_size)
    caches = [cache.half().nan_to_num().contiguous() for cache in batch.inputs[1:3]]

    assert layer_caches(caches).word_bytes == word_bytes
    assert_committed(caches, batch, paths([2, 4]))


def test_requests_without_rows_and_nodes_that_were_cut_off_move_nothing() -> None:
    batch = random_batch([20, 20], [0, 3], max_rows=6)
    assert_committed(layers_of(batch, 1), batch, torch.tensor([[0, 3, 5], [0, 2, 4]]))


def test_a_path_of_63_nodes() -> None:
    batch = random_batch([5, 17], [64, 64], head_size=16, num_kv_heads=1)
    assert_committed(layers_of(batch, 1), batch, paths(list(range(1, 64)), list(range(2, 64))))


def test_more_words_than_one_program_holds() -> None:
    batch = random_batch([5], [8], head_size=256, num_kv_heads=5)
    caches = layers_of(batch, 1)

    assert commit_kv.plan(layer_caches(caches), batch.trees, paths([3, 4, 7])).grid[2] > 1
    assert_committed(caches, batch, paths([3, 4, 7]))


def test_caches_of_different_kinds_are_refused() -> None:
    cache = torch.zeros(4, 16, 2, 64)

    with pytest.raises(ValueError, match="2 caches of 2 kinds were given"):
        layer_caches([cache, cache.half()])
    with pytest.raises(ValueError, match="0 caches of 0 kinds"):
        layer_caches([])
    batch = random_batch([5], [3])
    with pytest.raises(ValueError, match="nodes are of 2 requests, but trees of 1"):
        commit_kv.commit_kv(LayerCaches((cache,), torch.zeros(1), 8), batch.trees, paths([1], [2]))
