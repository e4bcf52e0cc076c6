"""Tree attention on vLLM's stock CPU kernel, in rounds over the request's own slots: no scratch memory, any KV layout.

The stock kernel is causal: a query row sees every earlier slot of its request. A tree is served by it path by path.
Its nodes lie depth first, so the new nodes of every root-to-leaf path are neighbours (a segment), and a path is a
chain once its keys and values stand at the slots of their depths:

    round k: for the k-th path of every tree, write what is not there yet of the path's keys and values at context +
             depth, then run the kernel on the segment's query rows

The paths are taken last to first and the most probable one, which lies first, comes last: it is what stays in the
cache, so that its acceptance needs no copy. Rows of prefill and of plain decoding run in the last round. What another
path needs to be committed is kept from the forward pass: the keys and values that the rounds wrote.

A round costs little but its overhead, and there is one per leaf and layer, so the rounds call the kernels themselves
instead of the stock methods around them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from vllm import _custom_ops
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
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
    write_rows: tuple[int, ...] = ()
    """Rows whose keys and values must be written before the kernel runs; the path's others stand where they belong."""
    write_slots: tuple[int, ...] = ()
    """For each of them the row whose slot, in the scheduler's linear mapping, is the one of its depth."""


class Call(NamedTuple):
    """One call of the stock kernel."""

    query_rows: torch.Tensor | slice  # [num_rows]
    metadata: CPUAttentionMetadata

    @classmethod
    def plan(
        cls, metadata: CPUAttentionMetadata, builder: CPUAttentionMetadataBuilder, segments: Sequence[Segment]
    ) -> Call:
        """Return the call for segments of different requests.

        Args:
            metadata: what the stock builder made for the batch.
            builder: that builder.
        """
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
        return cls(rows_of(segments), builder.build(0, common))

    def attend(
        self,
        impl: CPUAttentionBackendImpl,
        layer: Any,
        query: torch.Tensor,
        caches: Sequence[torch.Tensor],
        output: torch.Tensor,
    ) -> None:
        """Do what the stock `forward` does for a decoder, for these rows of `query` and `output`."""
        metadata = self.metadata
        part = output[self.query_rows]
        _custom_ops.cpu_attention_with_kv_cache(
            query[self.query_rows],
            *caches,
            part,
            metadata.query_start_loc,
            metadata.seq_lens,
            scale=impl.scale,
            causal=metadata.causal,
            alibi_slopes=impl.alibi_slopes,
            sliding_window=impl.sliding_window,
            block_table=metadata.block_table,
            softcap=impl.logits_soft_cap,
            scheduler_metadata=metadata.scheduler_metadata,
            s_aux=impl.sinks,
            dynamic_causal=metadata.dynamic_causal,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=impl.kv_cache_dtype,
        )
        if not isinstance(self.query_rows, slice):
            output[self.query_rows] = part


class Round(NamedTuple):
    """One call, and what is written before it."""

    writes: slice
    """Of the step's writes, those that come before it."""
    call: Call


class TreeRounds:
    """The rounds of one step.

    Args:
        metadata: what the stock builder made for the batch.
        builder: that builder; it plans every round for the kernel.
        requests: for every request its segments, first path first; one segment where there is no branching tree.
    """

    def __init__(
        self,
        metadata: CPUAttentionMetadata,
        builder: CPUAttentionMetadataBuilder,
        requests: Sequence[Sequence[Segment]],
    ) -> None:
        num_rounds = max(len(segments) for segments in requests)
        self.rounds: list[Round] = []
        rows: list[int] = []
        slot_rows: list[int] = []
        # the k-th call from the end serves the k-th segment: every first path is in the last call
        for index in range(num_rounds - 1, -1, -1):
            segments = [segments[index] for segments in requests if index < len(segments)]
            num_written = len(rows)
            for segment in segments:
                rows += segment.write_rows
                slot_rows += segment.write_slots
            self.rounds.append(Round(slice(num_written, len(rows)), Call.plan(metadata, builder, segments)))
        self._slot_mapping = metadata.slot_mapping
        self._write_rows = torch.tensor(rows, dtype=torch.int64)  # of all rounds
        self._write_slots = metadata.slot_mapping[torch.tensor(slot_rows, dtype=torch.int64)]
        # keys and values of the rows written, each [writes, kv_heads, head_size], by layer name: every node that is
        # not on its tree's first path is among them
        self._written: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

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
        """Fill `output`, round by round."""
        # copies: under torch.compile the buffers of key and value serve the next layer
        keys, values = key[self._write_rows], value[self._write_rows]
        self._written[layer.layer_name] = (keys, values)
        caches = stock_caches(kv_cache)
        for each in self.rounds:
            if each.writes.start < each.writes.stop:
                write(impl, layer, keys[each.writes], values[each.writes], caches, self._write_slots[each.writes])
            each.call.attend(impl, layer, query, caches, output)

    def commit(self, layers: Mapping[str, Any], rows: Sequence[int], slot_rows: Sequence[int]) -> None:
        """Write what was kept of the accepted nodes."""
        index_of = {row: index for index, row in enumerate(self._write_rows.tolist())}
        kept = torch.tensor([index_of[row] for row in rows])
        slots = self._slot_mapping[torch.tensor(slot_rows)]
        for name, (key, value) in self._written.items():
            layer = layers[name]
            layer.impl.do_kv_cache_update(layer, key[kept], value[kept], layer.kv_cache, slots)


def stock_caches(kv_cache: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the caches of keys and values as the stock operators take them.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], a shape that says little of what lies where.
    """
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    return kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, dim=2)


def write(
    impl: CPUAttentionBackendImpl,
    layer: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    caches: Sequence[torch.Tensor],
    slots: torch.Tensor,
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
        kv_cache_dtype=impl.kv_cache_dtype,
    )


def rows_of(segments: Sequence[Segment]) -> torch.Tensor | slice:
    """Return the rows of segments; consecutive ones as a slice, which needs no copy."""
    rows = [row for segment in segments for row in range(segment.start, segment.end)]
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)
