"""Tree attention in one pass: our kernel over the slots that vLLM has written, node i at context + i.

Where it serves, nothing is written but what an accepted path needs: the first path stands where it belongs, since its
nodes lie first, and the others are moved by `commit`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_redrafter.adapter.attention_rounds import Call, Segment, stock_caches
from vllm_redrafter.kernels import cpu_tree_attention
from vllm_redrafter.kernels.batch import AttentionOptions, TreeBatch, ancestor_words
from vllm_redrafter.kernels.cpu_library import NotCompiledError
from vllm_redrafter.kernels.cpu_tree_attention import LayerCache, TreeAttention

logger = init_logger(f"vllm.{__name__}")

_LAYOUTS = ("vec", "vec16")
"""vLLM's kernels whose cache ours reads."""

_TRIED_ROWS = 4
_TOLERANCE = 1e-4
"""Of sums in another order, at values of order 1."""


class TreePass:
    """The pass of one step.

    Args:
        metadata: what the stock builder made for the batch.
        builder: that builder.
        caches: those of the layers served, by name.
        requests: for every request all its rows as one segment.
        ancestors: for every request the word of each row, or none where the stock kernel serves: it has more rows than
            a word has bits, and no tree.
    """

    def __init__(
        self,
        metadata: CPUAttentionMetadata,
        builder: CPUAttentionMetadataBuilder,
        caches: Mapping[str, LayerCache],
        requests: Sequence[Segment],
        ancestors: Sequence[Sequence[int]],
    ) -> None:
        max_rows = max(len(words) for words in ancestors)
        padded = [[*words, *[0] * (max_rows - len(words))] for words in ancestors]
        self._trees = TreeAttention(
            TreeBatch(
                metadata.block_table,
                metadata.query_start_loc,
                metadata.seq_lens,
                torch.tensor(padded, dtype=torch.int64),
                max(segment.seq_len for segment in requests),
            )
        )
        others = [segment for segment, words in zip(requests, ancestors, strict=True) if not words]
        self._others = Call.plan(metadata, builder, others) if others else None
        self._caches = caches
        self._slot_mapping = metadata.slot_mapping

    def attend(
        self,
        impl: CPUAttentionBackendImpl,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Fill `output`."""
        if self._others is not None:
            self._others.attend(impl, layer, query, stock_caches(kv_cache), output)
        self._trees.run(query, self._caches[layer.layer_name], output)

    def commit(self, layers: Mapping[str, Any], rows: Sequence[int], slot_rows: Sequence[int]) -> None:
        """Move the accepted nodes' keys and values within the cache."""
        sources, targets = (self._slot_mapping[torch.tensor(each)] for each in (rows, slot_rows))
        for name, layer in layers.items():
            keys, values = self._caches[name].tensors
            places = sources // keys.shape[1], sources % keys.shape[1]
            layer.impl.do_kv_cache_update(layer, keys[places], values[places], layer.kv_cache, targets)


@torch.inference_mode()
def caches_served(builder: CPUAttentionMetadataBuilder, layers: Mapping[str, Any]) -> dict[str, LayerCache]:
    """Return the caches of these layers if the kernel computes their attention, else nothing.

    The kernel is compiled and tried here.

    Args:
        builder: of the metadata of these layers.
        layers: vLLM's by name, all of one KV cache group.
    """
    if builder.isa not in _LAYOUTS or builder.dtype != torch.float32 or builder.kv_cache_dtype != "auto":
        return {}
    if any(layer.impl.alibi_slopes is not None or layer.impl.sinks is not None for layer in layers.values()):
        return {}
    try:
        if not cpu_tree_attention.supports(builder.head_dim, builder.block_size):
            return {}
        agrees = _agrees(builder, next(iter(layers.values())))
        reason = "vLLM's cache is not what our kernel takes it for"
    except NotCompiledError as error:
        agrees, reason = False, str(error)
    if not agrees:
        logger.warning("Trees are attended to leaf by leaf, which costs more: %s", reason)
        return {}
    return {name: _layer_cache(layer.impl, layer.kv_cache) for name, layer in layers.items()}


def _agrees(builder: CPUAttentionMetadataBuilder, layer: Any) -> bool:
    """Return whether our kernel and vLLM's find the same for a chain in a cache that vLLM wrote, over two blocks."""
    impl = layer.impl
    block_size, rows = builder.block_size, _TRIED_ROWS
    length = block_size + rows // 2
    block_table = torch.tensor([[2, 0]], dtype=torch.int32)
    positions = torch.arange(length)
    slots = block_table[0].long()[positions // block_size] * block_size + positions % block_size
    kv_cache = torch.zeros(3, impl.num_kv_heads, block_size, 2 * impl.head_size)
    key, value = torch.randn(2, length, impl.num_kv_heads, impl.head_size, generator=torch.Generator().manual_seed(0))
    impl.do_kv_cache_update(layer, key, value, kv_cache, slots)
    query = torch.randn(rows, impl.num_heads, impl.head_size, generator=torch.Generator().manual_seed(1))
    query_start_loc = torch.tensor([0, rows], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=torch.tensor([length], dtype=torch.int32),
        num_reqs=1,
        num_actual_tokens=rows,
        max_query_len=rows,
        max_seq_len=length,
        block_table_tensor=block_table,
        slot_mapping=slots[-rows:],
        causal=True,
    )
    metadata = builder.build(0, common)
    ours, theirs = torch.empty(2, *query.shape)
    arguments = query, key[-rows:], value[-rows:], kv_cache
    impl.forward(layer, *arguments, metadata, theirs)
    caches = {layer.layer_name: _layer_cache(impl, kv_cache)}
    chain = TreePass(metadata, builder, caches, [Segment(0, 0, rows, length)], [ancestor_words(range(-1, rows - 1))])
    chain.attend(impl, layer, *arguments, ours)
    return torch.allclose(ours, theirs, rtol=_TOLERANCE, atol=_TOLERANCE)


def _layer_cache(impl: CPUAttentionBackendImpl, kv_cache: torch.Tensor) -> LayerCache:
    keys, values = stock_caches(kv_cache)
    num_blocks, num_kv_heads, block_size, head_size = keys.shape
    return LayerCache(
        keys.view(num_blocks, num_kv_heads, head_size, block_size).permute(0, 3, 1, 2),
        values.transpose(1, 2),
        AttentionOptions(impl.scale, impl.logits_soft_cap, max(impl.sliding_window, 0)),
    )
