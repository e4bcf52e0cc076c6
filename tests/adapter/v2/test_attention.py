from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention import Attention

from vllm_redrafter.adapter.v2 import attention
from vllm_redrafter.adapter.v2.step import Step
from vllm_redrafter.kernels import reference
from vllm_redrafter.kernels.batch import AttentionOptions, TreeBatch

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 4, 2, 32, 4


class StockImpl:
    """Fills its output with sevens."""

    scale = 0.5
    logits_soft_cap = None

    def __init__(self) -> None:
        self.num_calls = 0

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> torch.Tensor:
        self.num_calls += 1
        return output.fill_(7)


def layer_of(backend: str = "FLASH_ATTN", kind: type = Attention, **changes: Any) -> Any:
    """Return an attention layer of vLLM's, whose constructor needs a running engine."""
    layer = object.__new__(kind)
    found: dict[str, Any] = {
        "attn_backend": SimpleNamespace(get_name=lambda: backend, forward_includes_kv_cache_update=False),
        "impl": StockImpl(),
        "kv_cache_dtype": "auto",
        "sliding_window": None,
        "head_size": HEAD_SIZE,
        "has_sink": False,
        "_q_scale": torch.tensor(0.5),
        "_k_scale": torch.tensor(2.0),
        "_v_scale": torch.tensor(3.0),
        "kv_cache": torch.randn(6, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, generator=torch.Generator().manual_seed(0)),
    }
    for name, value in {**found, **changes}.items():
        setattr(layer, name, value)
    return layer


def trees() -> TreeBatch:
    """Return a fork of two nodes behind a context of five tokens."""
    return TreeBatch(
        torch.tensor([[3, 1]], dtype=torch.int32),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([8], dtype=torch.int32),
        torch.tensor([[1, 3, 5]]),
        8,
    )


def run(layer: Any, step: Step, num_rows: int = 3, metadata: Any = "metadata") -> tuple[torch.Tensor, torch.Tensor]:
    query = torch.randn(num_rows, HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(1))
    key = torch.zeros(num_rows, KV_HEADS, HEAD_SIZE)
    output = torch.full_like(query, float("nan"))
    layer.impl.forward(layer, query, key, key, layer.kv_cache, metadata, output)
    return query, output


def attached(step: Step, **changes: Any) -> Any:
    layer = layer_of(**changes)
    attention.attach({"layer": layer}, step)
    layer.impl.group = 0
    return layer


def expected(layer: Any, query: torch.Tensor) -> torch.Tensor:
    keys, values = layer.kv_cache.transpose(1, 2).chunk(2, dim=-1)
    out = torch.empty_like(query[:3])
    reference.tree_attention(query[:3], keys, values, trees(), AttentionOptions(0.5), out)
    return out


def test_a_batch_of_trees_is_our_kernels_alone() -> None:
    layer = attached(Step([trees()], has_only_trees=True))

    query, output = run(layer, layer.impl.step)

    assert layer.impl.num_calls == 0
    assert isinstance(layer.impl, StockImpl)
    torch.testing.assert_close(output, expected(layer, query))


def test_rows_beside_trees_stay_with_the_stock_implementation() -> None:
    layer = attached(Step([trees()]))

    query, output = run(layer, layer.impl.step, num_rows=5)

    assert layer.impl.num_calls == 1
    torch.testing.assert_close(output[:3], expected(layer, query))
    assert (output[3:] == 7).all()


@pytest.mark.parametrize(("batches", "metadata"), [([], "metadata"), ([trees()], None)], ids=["no trees", "profiling"])
def test_without_trees_the_stock_implementation_is_alone(batches: list[TreeBatch], metadata: Any) -> None:
    layer = attached(Step(batches, has_only_trees=bool(batches)))

    _, output = run(layer, layer.impl.step, metadata=metadata)

    assert layer.impl.num_calls == 1
    assert (output == 7).all()


def test_a_backend_that_writes_the_cache_in_its_forward_pass_is_not_left_out() -> None:
    backend = SimpleNamespace(get_name=lambda: "FLASHINFER", forward_includes_kv_cache_update=True)
    layer = attached(Step([trees()], has_only_trees=True), attn_backend=backend)

    query, output = run(layer, layer.impl.step)

    assert layer.impl.num_calls == 1
    torch.testing.assert_close(output, expected(layer, query))


def test_what_a_layer_is_like_reaches_the_kernel() -> None:
    layer = attached(Step(), kv_cache_dtype="fp8", sliding_window=9)

    assert layer.impl.options == AttentionOptions(0.5, 0.0, 9, layer._k_scale, layer._v_scale)
    assert not layer.impl.fused_output_quant_supported("fp8")


def test_two_layers_of_one_backend_share_a_class_and_no_more() -> None:
    one, two = Step(), Step()

    first, second = attached(one), attached(two)

    assert type(first.impl) is type(second.impl)
    assert (first.impl.step, second.impl.step) == (one, two)
    assert first.impl.step is one


class OtherAttention(Attention):
    """Masks as it likes."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "FLEX_ATTENTION"}, "cannot read the KV cache of the attention backend FLEX_ATTENTION: choose one"),
        ({"backend": "CPU_ATTN"}, "cannot read the KV cache of the attention backend CPU_ATTN: choose one of FLASH_AT"),
        ({"kind": OtherAttention}, "does not compute OtherAttention layers, which layer has: run without"),
        ({"head_size": 48}, "does not compute heads of 48, which layer has: run without speculation"),
        ({"has_sink": True}, "does not compute attention sinks, which layer has"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "does not compute a KV cache of fp8_e5m2, which layer has"),
    ],
)
def test_a_layer_that_the_kernels_do_not_compute_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        attention.attach({"layer": layer_of(**changes)}, Step())


def test_caches_are_bound_by_group_and_kind() -> None:
    layers = {name: attached(Step()) for name in "abc"}
    layers["c"].kv_cache = layers["c"].kv_cache[..., :HEAD_SIZE].contiguous()
    groups = [
        SimpleNamespace(layer_names=names, kv_cache_spec=SimpleNamespace(block_size=BLOCK_SIZE))
        for names in (["b"], ["a", "c"])
    ]

    bound = attention.bind_caches(layers, groups)

    assert [[len(caches.tensors) for caches in group] for group in bound] == [[1], [1, 1]]
    assert [layers[name].impl.group for name in "abc"] == [1, 0, 1]
    assert bound[0][0].tensors[0].data_ptr() == layers["b"].kv_cache.data_ptr()


def test_blocks_that_a_backend_splits_are_refused() -> None:
    groups = [SimpleNamespace(layer_names=["a"], kv_cache_spec=SimpleNamespace(block_size=2 * BLOCK_SIZE))]

    with pytest.raises(NotImplementedError, match="blocks of 4 tokens, but vLLM's tables have blocks of 8: choose"):
        attention.bind_caches({"a": attached(Step())}, groups)
