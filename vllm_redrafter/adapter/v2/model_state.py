"""The target's side of a step: positions and attention of trees, the walk, and the commit of accepted paths.

Where a step of vLLM's model runner V2 calls in, in its order:

    prepare_attn       which trees this step verifies
    prepare_inputs     node i of a tree stands at position context + depth, while its slot stays context + i; its row of
                       logits is its request's for LoRA too
    custom_sampler     (at start) the sampler that walks the trees
    postprocess_state  keys and values of the accepted paths move to their slots, before anything else is drafted
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_redrafter import kernels
from vllm_redrafter.adapter.v2 import attention, lora
from vllm_redrafter.adapter.v2.foresight import has_keyed_noise
from vllm_redrafter.adapter.v2.linear_requests import has_unknown_processors, is_linear
from vllm_redrafter.adapter.v2.sampler import TreeSampler
from vllm_redrafter.core.noise import leaves_tokens_out
from vllm_redrafter.kernels.batch import TreeBatch
from vllm_redrafter.kernels.caches import LayerCaches

if TYPE_CHECKING:
    from vllm_redrafter.adapter.v2.speculator import TreeSpeculator


class TreeModelState(DefaultModelState):
    """vLLM's default state for decoder-only targets, with trees."""

    speculator: TreeSpeculator
    """Of the same engine; a subclass made by `of` has it."""

    @classmethod
    def of(cls, speculator: TreeSpeculator) -> type[TreeModelState]:
        """Return this class for the engine of a speculator: vLLM makes the instance."""
        return type(cls.__name__, (cls,), {"speculator": speculator})

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.trees, self.step = self.speculator.trees, self.speculator.step
        self.positions = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=device)
        self.step.positions = self.positions
        self.ancestors = torch.zeros_like(self.trees.ancestors)  # of the batch, in its order
        self.layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, Attention)
        self.caches: list[list[LayerCaches]] = []
        self.adapters = lora.find_wrapper(model)
        attention.attach(self.layers, self.step)

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """Return vLLM's sampler for batches without drafts, and the one that walks trees."""
        self.speculator.drafts_chains_only = has_unknown_processors(sampler)
        self.speculator.has_foresight = has_keyed_noise(sampler)
        return sampler, TreeSampler(sampler, self.trees, self.step, self.positions)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Forget the tree of whoever had the slot before."""
        super().add_request(req_index, new_req_data)
        self.trees.clear(req_index)
        self.speculator.is_linear.np[req_index] = is_linear(new_req_data.sampling_params)
        is_foreseen = self.speculator.has_foresight and not leaves_tokens_out(new_req_data.sampling_params)
        self.speculator.is_foreseen.np[req_index] = is_foreseen

    def apply_staged_writes(self) -> None:
        """Hand what `add_request` noted to the device."""
        super().apply_staged_writes()
        self.speculator.is_linear.copy_to_uva()
        self.speculator.is_foreseen.copy_to_uva()

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Note where the layers' caches are."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.caches = attention.bind_caches(self.layers, kv_cache_config.kv_cache_groups)

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str]:
        """Return that a FULL graph may hold a batch of trees, and nothing beside them."""
        return AttentionCGSupport.UNIFORM_BATCH, "redrafter's tree attention"

    def prepare_attn(
        self, input_batch: Any, cudagraph_mode: Any, block_tables: tuple[torch.Tensor, ...], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Return vLLM's metadata, and begin the step with the trees of the batch."""
        metadata: dict[str, Any] = super().prepare_attn(input_batch, cudagraph_mode, block_tables, *args, **kwargs)
        num_requests = input_batch.num_reqs
        if kwargs.get("for_capture"):
            # vLLM captures uniform batches only, and those of more than one token per request are trees
            num_trees = num_requests if input_batch.num_tokens > num_requests else 0
            max_seq_len = self.max_model_len
        else:
            num_drafts = input_batch.num_draft_tokens_per_req
            num_trees = 0 if num_drafts is None else int((num_drafts > 0).sum())
            # on the host: an upper bound that the scheduler knows
            max_seq_len = int(input_batch.seq_lens_cpu_upper_bound.numpy().max())
        self.step.nodes = None
        self.step.has_only_trees = num_trees == num_requests
        self.step.trees = []
        if num_trees:
            torch.index_select(
                self.trees.ancestors, 0, input_batch.idx_mapping[:num_trees], out=self.ancestors[:num_trees]
            )
            self.step.trees = [
                TreeBatch(
                    block_table[:num_trees],
                    input_batch.query_start_loc[: num_trees + 1],
                    input_batch.seq_lens[:num_trees],
                    self.ancestors[:num_trees],
                    max_seq_len,
                )
                for block_table in block_tables
            ]
        return metadata

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Return the positions of the batch: vLLM's own, but by depth where there is a tree."""
        inputs = super().prepare_inputs(input_batch, req_states)
        if self.adapters is not None:
            lora.spread(self.adapters, input_batch)
        positions = self.positions[: input_batch.num_tokens_after_padding]
        positions.copy_(input_batch.positions)
        kernels.backend().tree_positions(
            input_batch.expanded_idx_mapping,
            input_batch.expanded_local_pos,
            input_batch.logits_indices,
            self.trees.depths,
            positions,
        )
        return {**inputs, "positions": positions}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Return what a CUDA graph is captured with: the buffer that `prepare_inputs` fills."""
        return {**super().prepare_dummy_inputs(num_reqs, num_tokens), "positions": self.positions[:num_tokens]}

    def postprocess_state(self, idx_mapping: torch.Tensor, num_sampled: Any, *args: Any, **kwargs: Any) -> None:
        """Move the keys and values of accepted nodes to the slots that their tokens have in the text."""
        super().postprocess_state(idx_mapping, num_sampled, *args, **kwargs)
        if self.step.nodes is None:
            return
        for trees, group_caches in zip(self.step.trees, self.caches, strict=True):
            for caches in group_caches:
                kernels.backend().commit_kv(caches, trees, self.step.nodes[: len(trees.seq_lens)])
