"""Tree attention over the KV cache of whichever backend vLLM has chosen.

Prefill and plain decoding stay with the stock implementation. The rows of trees are written by our kernel, from the
same paged cache: FlashAttention, Triton and FlashInfer all keep [num_blocks, num_kv_heads, block_size, 2 * head_size],
keys and values side by side, in whatever order of strides.

What the tests run is that layout under Triton's interpreter, behind a stock implementation in plain torch, FULL CUDA
graphs included, which are recorded and replayed there. The three backends themselves and fp8 caches behind them need a
GPU and have not been run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_redrafter import kernels
from vllm_redrafter.adapter.v2.step import Step
from vllm_redrafter.kernels.batch import HEAD_SIZES, AttentionOptions
from vllm_redrafter.kernels.caches import LayerCaches, layer_caches

BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")
"""Whose KV cache our kernels read."""


@functools.cache
def tree_attention_class(stock: Any) -> Any:
    """Return the subclass of a stock `AttentionImpl` that leaves the rows of trees to our kernel.

    It adds no slots, so that an object of the stock class can become one of it.
    """

    class TreeAttention(stock):
        step: Step
        group: int  # KV cache group of the layer
        options: AttentionOptions

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,  # [num_tokens, num_heads, head_size]
            key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
            value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
            kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
            attn_metadata: Any,
            output: torch.Tensor,  # [num_tokens, num_heads, head_size]
            output_scale: torch.Tensor | None = None,
            output_block_scale: torch.Tensor | None = None,
        ) -> torch.Tensor:
            trees = self.step.trees if attn_metadata is not None else []
            writes_cache = layer.attn_backend.forward_includes_kv_cache_update
            if not trees or not self.step.has_only_trees or writes_cache:
                super().forward(
                    layer,
                    query,
                    key,
                    value,
                    kv_cache,
                    attn_metadata,
                    output,
                    output_scale=output_scale,
                    output_block_scale=output_block_scale,
                )
            if trees:
                if query.dtype != output.dtype:
                    # some backends take queries in fp8; ours takes them as the model has them
                    query = query.to(output.dtype) * layer._q_scale.to(output.dtype)
                keys, values = split_cache(kv_cache, layer.kv_cache_dtype)
                kernels.backend().tree_attention(query, keys, values, trees[self.group], self.options, output)
            return output

        def fused_output_quant_supported(self, quant_key: Any) -> bool:
            # our kernel writes what the model computes in
            return False

    return TreeAttention


def attach(layers: Mapping[str, Any], step: Step) -> None:
    """Let vLLM's attention layers verify the trees of `step`.

    The implementations stay the objects that vLLM has made, and instances of their classes: only what they do for
    trees is added.

    Raises:
        NotImplementedError: a layer's attention is of a kind that our kernels do not compute.
    """
    for name, layer in layers.items():
        _check(name, layer)
        stock: Any = type(layer.impl)
        layer.impl.__class__ = tree_attention_class(stock)
        layer.impl.step = step
        is_quantised = is_quantized_kv_cache(layer.kv_cache_dtype)
        layer.impl.options = AttentionOptions(
            layer.impl.scale,
            soft_cap=layer.impl.logits_soft_cap or 0.0,
            sliding_window=layer.sliding_window or 0,
            k_scale=layer._k_scale if is_quantised else None,
            v_scale=layer._v_scale if is_quantised else None,
        )


def bind_caches(layers: Mapping[str, Any], groups: Sequence[Any]) -> list[list[LayerCaches]]:
    """Return, by KV cache group, the layers' caches as `commit_kv` takes them, and tell the layers their group.

    Args:
        layers: vLLM's attention layers by name, their caches allocated.
        groups: vLLM's `KVCacheGroupSpec`s.

    Raises:
        NotImplementedError: a backend splits vLLM's blocks into smaller ones.
    """
    caches = []
    for index, group in enumerate(groups):
        kinds: dict[Any, list[torch.Tensor]] = {}
        for name in group.layer_names:
            layer, block_size = layers[name], group.kv_cache_spec.block_size
            if layer.kv_cache.shape[2] != block_size:
                raise NotImplementedError(
                    f"the KV cache of {name} has blocks of {layer.kv_cache.shape[2]} tokens, but vLLM's tables have "
                    f"blocks of {block_size}: choose a --block-size that {layer.attn_backend.get_name()} takes whole"
                )
            layer.impl.group = index
            cache = layer.kv_cache.transpose(1, 2)
            kinds.setdefault((cache.shape, cache.stride(), cache.dtype), []).append(cache)
        caches.append([layer_caches(kind) for kind in kinds.values()])
    return caches


def split_cache(kv_cache: torch.Tensor, kv_cache_dtype: str) -> tuple[torch.Tensor, ...]:
    """Return keys and values, [num_blocks, block_size, num_kv_heads, head_size] each, as views of a layer's cache."""
    if is_quantized_kv_cache(kv_cache_dtype):
        kv_cache = kv_cache.view(current_platform.fp8_dtype())
    return kv_cache.transpose(1, 2).chunk(2, dim=-1)


def _check(name: str, layer: Any) -> None:
    backend = layer.attn_backend.get_name()
    if backend not in BACKENDS:
        raise NotImplementedError(
            f"redrafter cannot read the KV cache of the attention backend {backend}: "
            f"choose one of {', '.join(BACKENDS)} with --attention-backend"
        )
    found = {
        # what a subclass masks is its own secret
        f"{type(layer).__name__} layers": type(layer) is not Attention,
        f"heads of {layer.head_size}": layer.head_size not in HEAD_SIZES,
        "attention sinks": layer.has_sink,
        "ALiBi": getattr(layer.impl, "alibi_slopes", None) is not None,
        f"a KV cache of {layer.kv_cache_dtype}": layer.kv_cache_dtype
        not in ("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3"),
    }
    for feature, present in found.items():
        if present:
            raise NotImplementedError(
                f"redrafter's tree attention does not compute {feature}, which {name} has: run without speculation"
            )
