"""Stand-ins for what a GPU has and vLLM's CPU platform, or Triton's interpreter, lacks.

FlashAttention, Triton's and FlashInfer's attention all keep keys and values side by side in
[num_blocks, num_kv_heads, block_size, 2 * head_size]. vLLM's own CPU kernel does not. The backend here does, in plain
torch, with and without the plugin, so that comparisons are between two engines of one stock backend. Async scheduling
works under model runner V2 on a CPU too, but its platform turns it off. A GPU's worker does more at start, and so does
this one. Two kernels of vLLM's cannot be interpreted: that for top-k and top-p, which vLLM has in torch too, and that
for the masks of grammars.
"""

from __future__ import annotations

import itertools
import os
from functools import cache, partial
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker
from vllm.v1.worker.gpu.warmup import warmup_kernels

from tests.engine.v2 import recorded_graphs
from tests.kernels.interpreter import multiply_bf16, patch_the_language_once

RECORDS_GRAPHS = os.environ.get("RECORD_CUDA_GRAPHS") == "1"
"""Whether CUDA graphs are captured, as `recorded_graphs` does."""


@cache
def register() -> None:
    """Put the stand-ins in their places, once in a process.

    The backend goes in that of vLLM's own, the only one it chooses on a CPU.
    """
    multiply_bf16()
    patch_the_language_once()
    topk_topp_sampler.HAS_TRITON = False
    StructuredOutputsWorker.apply_grammar_bitmask = apply_grammar_bitmask
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{PagedAttentionBackend.__name__}")
    stock = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        asked, compilation = vllm_config.scheduler_config.async_scheduling, vllm_config.compilation_config
        mode, backend, sizes = compilation.mode, compilation.backend, compilation.cudagraph_capture_sizes
        stock(vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked
        if RECORDS_GRAPHS:
            compilation.mode, compilation.backend, compilation.cudagraph_capture_sizes = mode, backend, sizes

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)
    start_as_on_a_gpu()
    if RECORDS_GRAPHS:
        recorded_graphs.install()


def start_as_on_a_gpu() -> None:
    """Let the worker do at start what a GPU's does: run without a KV cache, get a throwaway one, warm kernels up."""
    determine, warm_up = CPUWorker.determine_available_memory, CPUWorker.compile_or_warm_up_model

    def determine_available_memory(self: CPUWorker) -> int:
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.profile_run()
            if not RECORDS_GRAPHS:
                # nothing is captured, and there are no sizes for it
                self.model_runner.compilation_config.max_cudagraph_capture_size = 1
            cudagraph_utils._init_minimal_kv_cache_for_profiling(self.model_runner)
            cudagraph_utils._teardown_profiling_state(self.model_runner)
        return determine(self)

    def compile_or_warm_up_model(self: CPUWorker) -> Any:
        times = warm_up(self)
        # it asks for log-probabilities of prompts, which vLLM's CPU kernels do not give where there are adapters
        if self.vllm_config.lora_config is None:
            warmup_kernels(self.model_runner, self.execute_model, self.sample_tokens)
        return times

    CPUWorker.determine_available_memory = determine_available_memory
    CPUWorker.compile_or_warm_up_model = compile_or_warm_up_model


def apply_grammar_bitmask(
    self: StructuredOutputsWorker,
    logits: torch.Tensor,
    input_batch: Any,
    grammar_req_ids: list[str],
    grammar_bitmask: Any,  # [masks of these requests, words]
) -> None:
    """Forbid what the grammars forbid, row by row of every request in the order of its tokens."""
    ends = input_batch.cu_num_logits_np.tolist()
    # vLLM 0.33 brings masks for as many rows as a request may have, 0.32 for those that it has
    has_spare_masks = len(grammar_bitmask) == len(grammar_req_ids) * self.mask_stride
    first = 0
    for request in map(input_batch.req_ids.index, grammar_req_ids):
        rows = logits[ends[request] : ends[request + 1]]
        words = torch.from_numpy(grammar_bitmask)[first : first + len(rows), :, None]
        is_allowed = (words >> torch.arange(32) & 1).bool().flatten(1)[:, : logits.shape[1]]
        rows.masked_fill_(~is_allowed, float("-inf"))
        first += self.mask_stride if has_spare_masks else len(rows)


class PagedAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    _cudagraph_support = AttentionCGSupport.ALWAYS


class PagedAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return PagedAttentionMetadataBuilder

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
        if attn_metadata is not None:
            recorded_graphs.kernel(partial(self._attend, query, kv_cache, attn_metadata, output))
        return output

    def _attend(self, query: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: Any, output: torch.Tensor) -> None:
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

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        recorded_graphs.kernel(partial(self._write, key, value, kv_cache, slot_mapping))

    def _write(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        cache, kept = kv_cache.transpose(1, 2), slot_mapping >= 0
        slots = slot_mapping[kept]
        rows = torch.cat((key, value), dim=-1)[: len(kept)]
        cache[slots // cache.shape[1], slots % cache.shape[1]] = rows[kept]
