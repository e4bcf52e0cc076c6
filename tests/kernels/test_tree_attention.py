from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vllm_redrafter.bench.tree_batches import Batch, random_batch
from vllm_redrafter.kernels import reference
from vllm_redrafter.kernels.batch import AttentionOptions
from vllm_redrafter.kernels.gpu import Gpu, gpu_of

tree_attention = pytest.importorskip(
    "vllm_redrafter.kernels.tree_attention", reason="needs Triton", exc_type=ImportError
)

# fp32 sums in another order: some units in the last place of values of order 1
FP32 = {"rtol": 1e-5, "atol": 3e-6}
# what goes into the second product is rounded to 11 bits
FP16 = {"rtol": 4e-3, "atol": 4e-3}
# to 8 bits
BF16 = {"rtol": 3e-2, "atol": 3e-2}


def options_for(batch: Batch, **options: Any) -> AttentionOptions:
    return AttentionOptions(batch.query.shape[-1] ** -0.5, **options)


def attend(batch: Batch, options: AttentionOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what kernel and twin wrote to outputs that were NaN."""
    ours, expected = torch.full_like(batch.query, math.nan), torch.full_like(batch.query, math.nan)
    tree_attention.tree_attention(*batch.inputs, options, ours)
    reference.tree_attention(*batch.inputs, options, expected)
    return ours, expected


def assert_same(batch: Batch, tolerance: dict[str, float] = FP32, **options: Any) -> None:
    ours, expected = attend(batch, options_for(batch, **options))

    num_rows = int(batch.trees.query_start_loc[-1])
    assert not expected[:num_rows].isnan().any()
    torch.testing.assert_close(ours[:num_rows], expected[:num_rows], **tolerance)
    assert ours[num_rows:].isnan().all()


def num_splits(batch: Batch) -> int:
    out = torch.empty_like(batch.query)
    launches = tree_attention.plan(*batch.inputs, options_for(batch), out, gpu_of(out.device))
    assert len(launches) == (1 if launches[0].arguments["num_splits"] == 1 else 2)
    count: int = launches[0].arguments["num_splits"]
    return count


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (8, 1)], ids=str)
def test_heads_and_layouts(heads: tuple[int, int], layout: str) -> None:
    assert_same(random_batch([37, 16, 3], [5, 7, 2], num_heads=heads[0], num_kv_heads=heads[1], layout=layout))


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 192, 256])
def test_head_sizes(head_size: int) -> None:
    assert_same(random_batch([37, 70], [5, 3], head_size=head_size))


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128])
def test_trees_that_end_before_at_and_behind_a_block(block_size: int) -> None:
    rows = 6
    contexts = [block_size - rows - 1, block_size - rows, block_size - 1, block_size]
    assert_same(random_batch(contexts, [rows] * 4, block_size=block_size))


def test_an_empty_context() -> None:
    assert_same(random_batch([0, 0], [7, 1]))


@pytest.mark.parametrize("num_nodes", [0, 1, 31, 32, 62, 63])
def test_trees_of_so_many_nodes(num_nodes: int) -> None:
    assert_same(random_batch([41], [1 + num_nodes], num_heads=2, num_kv_heads=1))


def test_a_chain_is_causal_attention() -> None:
    batch = random_batch([20], [6])
    chain = torch.tensor([[(2 << row) - 1 for row in range(6)]])
    batch = batch._replace(trees=batch.trees._replace(ancestors=chain))

    ours, _ = attend(batch, options_for(batch))

    positions = torch.arange(26)
    blocks = batch.trees.block_table[0, positions // 16].long()
    k, v = (cache[blocks, positions % 16].repeat_interleave(2, dim=1) for cache in batch.inputs[1:3])
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.transpose(0, 1) for tensor in (batch.query[:6], k, v)),
        attn_mask=positions <= 20 + torch.arange(6)[:, None],
    )
    torch.testing.assert_close(ours[:6], expected.transpose(0, 1), **FP32)


def test_requests_with_fewer_rows_or_none() -> None:
    assert_same(random_batch([30, 12, 0, 45], [5, 0, 0, 2], max_rows=9))


def test_rows_of_padding_become_zero() -> None:
    batch = random_batch([300, 17], [6, 6])
    batch.trees.ancestors[:, 4:] = 0

    ours, expected = attend(batch, options_for(batch))

    torch.testing.assert_close(ours[:12], expected[:12], **FP32)
    assert (ours[4:6] == 0).all()
    assert (ours[10:12] == 0).all()
    assert (ours[:4] != 0).all()


def test_a_long_context_is_split_and_joined() -> None:
    batch = random_batch([1000, 0, 130], [5, 3, 4], num_kv_heads=1, max_rows=8)
    single = batch._replace(trees=batch.trees._replace(max_seq_len=130))

    assert num_splits(batch) == 3
    assert num_splits(single) == 1
    assert_same(batch)
    # the bound divides the work and bounds nothing else
    assert_same(single)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 16, 32, 64, 256])
@pytest.mark.parametrize("context_len", [4096, 32768, 131072])
def test_splits_leave_few_multiprocessors_idle(batch_size: int, context_len: int) -> None:
    lens = [5] * batch_size, [17] * batch_size
    batch = random_batch(*lens, num_heads=32, num_kv_heads=8, dtype=torch.bfloat16)
    batch = batch._replace(trees=batch.trees._replace(max_seq_len=context_len))

    rounds = 8 * batch_size * num_splits(batch) / 132

    assert rounds / math.ceil(rounds) > 0.9


def test_padding_in_a_split_context() -> None:
    batch = random_batch([600], [5])
    batch.trees.ancestors[0, 3:] = 0

    assert num_splits(batch) == 2
    assert_same(batch)


@pytest.mark.parametrize("context_len", [3, 61, 600])
@pytest.mark.parametrize("window", [1, 2, 5, 64, 500])
def test_a_sliding_window_counts_from_the_depth(window: int, context_len: int) -> None:
    assert_same(random_batch([context_len], [12], num_heads=2, num_kv_heads=1), sliding_window=window)


def test_a_soft_cap() -> None:
    batch = random_batch([50, 2], [5, 9])

    assert_same(batch, soft_cap=0.5)
    assert_same(batch._replace(query=100 * batch.query), soft_cap=30.0)


@pytest.mark.parametrize("head_size", [64, 80])
def test_half_precision(head_size: int) -> None:
    assert_same(random_batch([70, 5], [5, 9], head_size=head_size, dtype=torch.float16), FP16)
    assert_same(random_batch([70, 5], [5, 9], head_size=head_size, dtype=torch.bfloat16), BF16)


@pytest.mark.parametrize("capability", [80, 90])
def test_an_fp8_cache_with_its_scales(capability: int) -> None:
    batch = random_batch([70, 5], [5, 9])
    batch = batch._replace(cache=batch.cache.to(torch.float8_e4m3fn))
    options = options_for(batch, k_scale=torch.tensor([0.5]), v_scale=torch.tensor([3.0]))
    ours, expected = torch.full_like(batch.query, math.nan), torch.full_like(batch.query, math.nan)

    for launch in tree_attention.plan(*batch.inputs, options, ours, Gpu(capability)):
        launch.run()
    reference.tree_attention(*batch.inputs, options, expected)

    torch.testing.assert_close(ours[:14], expected[:14], **FP32)


def test_every_e4m3_number_is_decoded() -> None:
    # one key per request: the output is its value
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    values = codes.repeat(2)[: 4 * 64].view(torch.float8_e4m3fn).reshape(4, 1, 1, 64)
    batch = random_batch([0] * 4, [1] * 4, num_heads=1, num_kv_heads=1, block_size=1)
    batch = batch._replace(cache=torch.cat((values.view(torch.uint8),) * 2, dim=-1).view(values.dtype))
    batch.trees.block_table[:, 0] = torch.arange(4)
    ours = torch.full_like(batch.query, math.nan)

    for launch in tree_attention.plan(*batch.inputs, options_for(batch), ours, Gpu(80)):
        launch.run()

    assert torch.equal(ours[:4], values[:, 0].float())


def test_what_no_kernel_can_do_is_refused() -> None:
    batch = random_batch([5], [3])
    out = torch.empty_like(batch.query)
    options = options_for(batch)
    query, keys, values, trees = batch.inputs

    with pytest.raises(ValueError, match="head_size is 72, but the kernel knows"):
        tree_attention.tree_attention(batch.query.new_zeros(3, 4, 72), *batch.inputs[1:], options, out)
    with pytest.raises(ValueError, match="4 heads of 64 do not fit caches"):
        tree_attention.tree_attention(query, keys, values[:1], trees, options, out)
    with pytest.raises(ValueError, match="last stride is 1"):
        tree_attention.tree_attention(*batch.inputs, options, out.transpose(1, 2).contiguous().transpose(1, 2))
    too_large = batch.trees._replace(ancestors=torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="at most 63 nodes"):
        tree_attention.tree_attention(*batch.inputs[:3], too_large, options, out)
    of_two_batches = batch.trees._replace(query_start_loc=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"of \(1, 2, 1\) requests, but ancestors of 1"):
        tree_attention.tree_attention(*batch.inputs[:3], of_two_batches, options, out)
