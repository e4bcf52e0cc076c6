"""What a GPU has and vLLM's CPU platform lacks: a KV cache as on GPUs, and async scheduling.

FlashAttention, Triton's and FlashInfer's attention all keep keys and values side by side in
[num_blocks, num_kv_heads, block_size, 2 * head_size]. vLLM's own CPU kernel does not. This one does, in plain torch,
with and without the plugin, so that comparisons are between two engines of one stock backend. Async scheduling works
under model runner V2 on a CPU too, but its platform turns it off.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


def register() -> None:
    """Put the backend in the place of vLLM's own, the only one that it chooses on a CPU, and keep async scheduling."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{PagedAttentionBackend.__name__}")
    stock = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        asked = vllm_config.scheduler_config.async_scheduling
        stock(vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)


class PagedAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "TRITON_ATTN"

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return PagedAttentionImpl


class PagedAttentionImpl(CPUAttentionBackendImpl):
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
        if attn_metadata is None:
            return output
        cache = kv_cache.transpose(1, 2)
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        for request, (start, end) in enumerate(itertools.pairwise(starts)):
            positions = torch.arange(lengths[request])
            blocks = attn_metadata.block_table[request, positions // cache.shape[1]].long()
            group = self.num_heads // self.num_kv_heads
            rows = cache[blocks, positions % cache.shape[1]].repeat_interleave(group, dim=1).transpose(0, 1)
            k, v = rows.chunk(2, dim=-1)  # [num_heads, seq_len, head_size]
            distance = positions[start - end :, None] - positions
            seen = distance >= 0
            if self.sliding_window > 0:
                seen &= distance < self.sliding_window
            scores = self.scale * query[start:end].transpose(0, 1) @ k.transpose(1, 2)
            weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
            output[start:end] = (weights @ v).transpose(0, 1)
        return output

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        cache, kept = kv_cache.transpose(1, 2), slot_mapping >= 0
        slots = slot_mapping[kept]
        rows = torch.cat((key, value), dim=-1)[: len(kept)]
        cache[slots // cache.shape[1], slots % cache.shape[1]] = rows[kept]
