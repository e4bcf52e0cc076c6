"""Attention over token trees on CPUs, in the place of vLLM's own.

Batches without drafts are served by the stock kernel as always. Drafts are attended to in one pass where our kernel
computes what the layers are like (`attention_pass`); elsewhere chains are left to the stock one too, and trees are
served by it leaf by leaf (`attention_rounds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)


class TreeAttention(Protocol):
    """How the trees of one step are attended to, by the layers of one group."""

    def attend(
        self,
        impl: CPUAttentionBackendImpl,
        layer: Any,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        kv_cache: torch.Tensor,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size]
    ) -> None:
        """Fill `output`; vLLM has written the keys and values of all rows to the scheduler's linear slots."""

    def commit(self, layers: Mapping[str, Any], rows: Sequence[int], slot_rows: Sequence[int]) -> None:
        """Do what `attention.commit` says."""


@dataclass
class TreeAttentionMetadata(CPUAttentionMetadata):
    """Stock metadata of the whole batch, and what replaces its one call of the kernel."""

    trees: TreeAttention = field(kw_only=True)
    layer_names: Sequence[str] = field(kw_only=True)

    @classmethod
    def of(cls, stock: CPUAttentionMetadata, trees: TreeAttention, layer_names: Sequence[str]) -> TreeAttentionMetadata:
        """Return what the stock builder made for the batch, with `trees`."""
        stock_fields = {each.name: getattr(stock, each.name) for each in fields(stock)}
        return cls(**stock_fields, trees=trees, layer_names=layer_names)


class TreeAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU attention with trees; registered in its place by our worker."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Return the implementation that knows trees."""
        return TreeAttentionImpl


class TreeAttentionImpl(CPUAttentionBackendImpl):
    """The stock kernel, but for batches whose metadata says how their trees are attended to."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `output`, filled."""
        if isinstance(attn_metadata, TreeAttentionMetadata):
            attn_metadata.trees.attend(self, layer, query, key, value, kv_cache, output)
            return output
        stock: torch.Tensor = super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )
        return stock


def check(layers: Mapping[str, Any]) -> None:
    """Refuse attention that is more than causal attention over the request's own slots.

    Args:
        layers: vLLM's attention layers by name.

    Raises:
        NotImplementedError: a layer is of a subclass, and what that masks or adds is its own secret.
    """
    for name, layer in layers.items():
        if type(layer) is not Attention:
            raise NotImplementedError(
                f"redrafter's tree attention does not compute {type(layer).__name__} layers, of which {name} is one: "
                "run without speculation"
            )


def commit(
    layers: Mapping[str, Any], metadata: TreeAttentionMetadata, rows: Sequence[int], slot_rows: Sequence[int]
) -> None:
    """Write accepted nodes that are not on a first path to the slots of their depths, in the layers of `metadata`.

    Args:
        layers: vLLM's attention layers by name.
        rows: rows of those nodes in the batch just verified.
        slot_rows: for each the row whose slot in the linear mapping is the one of its depth.
    """
    metadata.trees.commit({name: layers[name] for name in metadata.layer_names}, rows, slot_rows)
