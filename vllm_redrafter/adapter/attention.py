"""Tree attention on vLLM's stock CPU kernel, in rounds over the request's own slots: no scratch memory, any KV layout.

The stock kernel is causal: a query row sees every earlier slot of its request. A tree is served by it path by path.
Its nodes lie depth first, so the new nodes of every root-to-leaf path are neighbours (a segment), and a path is a
chain once its keys and values stand at the slots of their depths:

    round k: for the k-th path of every tree, write what is not there yet of the path's keys and values at context +
             depth, then run the kernel on the segment's query rows

The paths are taken last to first and the most probable one, which lies first, comes last: it is what stays in the
cache, so that its acceptance needs no copy. Rows of prefill and of plain decoding run in the last round. What another
path needs to be committed (`commit`) is kept from the forward pass: the keys and values that the rounds wrote.

A round costs little but its overhead, and there is one per leaf and layer, so the rounds call the kernels themselves
instead of the stock methods around them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from vllm import _custom_ops
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)


class Segment(NamedTuple):
    """The new nodes of one root-to-leaf path: consecutive rows, or all rows of a request without a tree."""

    request: int
    start: int
    """First row."""
    end: int
    """Row behind the last."""
    seq_len: int
    """Context, path and all: what the last row sees, itself included."""
    write_rows: tuple[int, ...]
    """Rows whose keys and values must be written before the kernel runs; the path's others stand where they belong."""
    write_slots: tuple[int, ...]
    """For each of them the row whose slot, in the scheduler's linear mapping, is the one of its depth."""


class Round(NamedTuple):
    """One call of the kernel."""

    query_rows: torch.Tensor | slice  # [num_rows]
    writes: slice
    """Of the step's writes, those that come before it."""
    metadata: CPUAttentionMetadata


@dataclass
class TreeAttentionMetadata(CPUAttentionMetadata):
    """Stock metadata of the whole batch, and the rounds that replace its one call of the kernel."""

    rounds: list[Round] = field(default_factory=list)
    write_rows: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # of all rounds
    write_slots: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    written: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Keys and values of `write_rows`, each [writes, kv_heads, head_size], by layer name: every node that is not on its
    tree's first path is among them."""


class TreeAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU attention with trees; registered in its place by our worker."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Return the implementation that runs rounds."""
        return TreeAttentionImpl


class TreeAttentionImpl(CPUAttentionBackendImpl):
    """The stock kernel, called once per round for a batch with branching trees and as always for any other."""

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
        """Return `output`, filled by the stock kernel."""
        if not isinstance(attn_metadata, TreeAttentionMetadata):
            stock: torch.Tensor = super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
            return stock
        # copies: under torch.compile the buffers of key and value serve the next layer
        keys, values = key[attn_metadata.write_rows], value[attn_metadata.write_rows]
        attn_metadata.written[layer.layer_name] = (keys, values)
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        caches = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, dim=2)
        for call in attn_metadata.rounds:
            if call.writes.start < call.writes.stop:
                slots = attn_metadata.write_slots[call.writes]
                self._write(layer, keys[call.writes], values[call.writes], caches, slots)
            rows = call.query_rows
            part = output[rows]
            self._attend(layer, query[rows], caches, call.metadata, part)
            if not isinstance(rows, slice):
                output[rows] = part
        return output

    def _write(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, caches: Sequence[torch.Tensor], slots: torch.Tensor
    ) -> None:
        """Do what the stock `do_kv_cache_update` does."""
        _custom_ops.cpu_attn_reshape_and_cache(
            key,
            value,
            *caches,
            slots,
            layer.isa,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )

    def _attend(
        self,
        layer: Any,
        query: torch.Tensor,
        caches: Sequence[torch.Tensor],
        metadata: CPUAttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        """Do what the stock `forward` does for a decoder."""
        _custom_ops.cpu_attention_with_kv_cache(
            query,
            *caches,
            output,
            metadata.query_start_loc,
            metadata.seq_lens,
            scale=self.scale,
            causal=metadata.causal,
            alibi_slopes=self.alibi_slopes,
            sliding_window=self.sliding_window,
            block_table=metadata.block_table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=metadata.scheduler_metadata,
            s_aux=self.sinks,
            dynamic_causal=metadata.dynamic_causal,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )


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


def add_rounds(
    metadata: CPUAttentionMetadata, builder: CPUAttentionMetadataBuilder, requests: Sequence[Sequence[Segment]]
) -> TreeAttentionMetadata:
    """Return metadata that serves `requests` in rounds.

    Args:
        metadata: what the stock builder made for the batch.
        builder: that builder; it plans every round for the kernel.
        requests: for every request its segments, first path first; one segment where there is no branching tree.
    """
    num_rounds = max(len(segments) for segments in requests)
    rounds: list[Round] = []
    rows: list[int] = []
    slot_rows: list[int] = []
    # the k-th call from the end serves the k-th segment: every first path is in the last call
    for index in range(num_rounds - 1, -1, -1):
        segments = [segments[index] for segments in requests if index < len(segments)]
        num_written = len(rows)
        for segment in segments:
            rows += segment.write_rows
            slot_rows += segment.write_slots
        query_rows = _rows([row for segment in segments for row in range(segment.start, segment.end)])
        rounds.append(Round(query_rows, slice(num_written, len(rows)), _plan_round(metadata, builder, segments)))
    stock = {stock_field.name: getattr(metadata, stock_field.name) for stock_field in fields(metadata)}
    write_rows, slot_indices = (torch.tensor(column, dtype=torch.int64) for column in (rows, slot_rows))
    write_slots = metadata.slot_mapping[slot_indices]
    return TreeAttentionMetadata(**stock, rounds=rounds, write_rows=write_rows, write_slots=write_slots)


def commit(
    layers: Mapping[str, Any], metadata: TreeAttentionMetadata, rows: Sequence[int], slot_rows: Sequence[int]
) -> None:
    """Write accepted nodes that are not on a first path to the slots of their depths, in the layers of `metadata`.

    Args:
        layers: vLLM's attention layers by name.
        rows: rows of those nodes in the batch just verified.
        slot_rows: for each the row whose slot in the linear mapping is the one of its depth.
    """
    index_of = {row: index for index, row in enumerate(metadata.write_rows.tolist())}
    kept = torch.tensor([index_of[row] for row in rows])
    slots = metadata.slot_mapping[torch.tensor(slot_rows)]
    for name, (key, value) in metadata.written.items():
        layer = layers[name]
        layer.impl.do_kv_cache_update(layer, key[kept], value[kept], layer.kv_cache, slots)


def _plan_round(
    metadata: CPUAttentionMetadata, builder: CPUAttentionMetadataBuilder, segments: Sequence[Segment]
) -> CPUAttentionMetadata:
    """Return the kernel's metadata for one segment of every request that still has one."""
    lengths = torch.tensor([0] + [segment.end - segment.start for segment in segments], dtype=torch.int32)
    seq_lens = torch.tensor([segment.seq_len for segment in segments], dtype=torch.int32)
    query_start_loc = lengths.cumsum(0, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=seq_lens,
        num_reqs=len(segments),
        num_actual_tokens=int(query_start_loc[-1]),
        max_query_len=int(lengths.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=metadata.block_table[torch.tensor([segment.request for segment in segments])],
        slot_mapping=metadata.slot_mapping,
        causal=True,
    )
    planned: CPUAttentionMetadata = builder.build(0, common)
    return planned


def _rows(rows: list[int]) -> torch.Tensor | slice:
    """Return consecutive rows as a slice, which needs no copy."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)
