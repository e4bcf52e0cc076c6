"""The drafter inside vLLM's model runner V2: from the hidden state at the last accepted node to the next tree.

All tensors that a draft reads and writes stay where they are, and nothing waits for the device, so that a draft is one
CUDA graph per size of batch. No GPU has run the graphs yet; the tests record and replay them on a CPU.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_redrafter import kernels
from vllm_redrafter.adapter import loading
from vllm_redrafter.adapter.config import ReDrafterOptions
from vllm_redrafter.adapter.v2.drafting import draft
from vllm_redrafter.adapter.v2.layer_outputs import LayerOutputs
from vllm_redrafter.adapter.v2.model_state import TreeModelState
from vllm_redrafter.adapter.v2.shared_head import best_of_all_ranks, rows_of_rank
from vllm_redrafter.adapter.v2.step import Step
from vllm_redrafter.adapter.v2.tree_buffers import TreeBuffers
from vllm_redrafter.core.beam_search import Choose
from vllm_redrafter.core.drafter import Embed, ReDrafter
from vllm_redrafter.kernels.batch import DraftStarts, PaddedTrees, RequestStates, StepRows

logger = init_logger(f"vllm.{__name__}")


class TreeSpeculator(DraftModelSpeculator):
    """What vLLM's runner asks for drafts."""

    model: ReDrafter
    embed: Embed
    drafted_ids: torch.Tensor
    """The target's id for every row of the drafter's head that this rank holds, [rows]."""
    choose: Choose
    """How a search finds its best continuations: with the other ranks, where they share the head."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.options = ReDrafterOptions.of(vllm_config)
        num_nodes = self.options.num_speculative_tokens
        self.trees = TreeBuffers(self.max_num_reqs, num_nodes, device)
        self.step = Step()
        self.is_linear = UvaBackedTensor(self.max_num_reqs, dtype=torch.int32)  # by request slot
        self.is_foreseen = UvaBackedTensor(self.max_num_reqs, dtype=torch.int32)  # by request slot
        self.drafts_chains_only = False
        self.has_foresight = False
        self.layer_outputs: LayerOutputs | None = None
        self.cudagraph_manager: CudaGraphManager | None = None
        # what a draft reads and writes, in the order of the batch
        input_size = (1 + len(self.options.layers_handed_out)) * self.hidden_size
        self._starts = DraftStarts.zeros(self.max_num_reqs, input_size, self.dtype, device)
        self._drafted = PaddedTrees.zeros(self.max_num_reqs, num_nodes, device)

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        """Return the drafter, and name the model state that verifies its trees to vLLM."""
        if hasattr(target_model, "get_model_state_cls"):
            raise NotImplementedError(
                f"{type(target_model).__name__} brings its own model state, which knows nothing of trees: "
                "run without speculation"
            )
        loaded = loading.load_beside(target_model, Path(self.options.model), self.dtype, self.device)
        self.embed = loaded.embed
        loaded.drafter.use(kernels.elementwise_of_backend())
        self._share_head(loaded.drafter)
        if self.options.layers_handed_out:
            self.layer_outputs = LayerOutputs(
                target_model,
                self.options.layers_handed_out,
                self.max_num_tokens,
                self.hidden_size,
                self.dtype,
                self.device,
            )
        millions = loaded.num_parameters / 1e6
        logger.info("Loaded the drafter %s (%.1fM parameters, %s)", self.options.model, millions, self.dtype)
        # vLLM asks the target for it; this instance only, other engines have nothing to do with us
        target_model.get_model_state_cls = lambda: TreeModelState.of(self)  # type: ignore[assignment]
        return loaded.drafter

    def _share_head(self, drafter: ReDrafter) -> None:
        """Leave this rank its rows of the drafter's head, where ranks can share it."""
        self.drafted_ids, self.choose = drafter.drafted_ids(self.device), kernels.backend().best_continuations
        num_kept = max(self.options.beam_width, self.options.num_speculative_tokens)
        rank, num_ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        rows = rows_of_rank(drafter.config, num_kept, rank, num_ranks)
        if rows is not None:
            drafter.keep_head_rows(rows)
            self.drafted_ids = self.drafted_ids[rows.start : rows.stop]
            self.choose = partial(best_of_all_ranks, first_row=rows.start)

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a drafter without attention has no KV cache to be told of."""

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Let drafts be captured where anything is."""
        mode = CUDAGraphMode.FULL_DECODE_ONLY if cudagraph_mode else CUDAGraphMode.NONE
        self.cudagraph_manager = CudaGraphManager(self.vllm_config, self.device, mode, decode_query_len=1)

    def capture(self) -> None:
        """Capture one CUDA graph per size of batch."""
        assert self.cudagraph_manager is not None
        self.cudagraph_manager.capture(
            lambda desc, warmup: lambda mode: self._draft(desc.num_reqs), "Capturing the drafter"
        )

    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,  # [num_reqs]
        num_rejected: torch.Tensor,  # [num_reqs]
        last_sampled: torch.Tensor,  # [max_num_reqs, 1]
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,  # [max_num_reqs] fp32
        seeds: torch.Tensor,  # [max_num_reqs] int64
        *args: Any,
        num_speculative_tokens: int | None = None,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the next N draft tokens of every request, [num_reqs, N], and remember what they are to each other.

        Args:
            num_speculative_tokens: how many of them will be verified: the first ones of a tree are a tree, and where
                there are none nothing is drafted.
        """
        num_requests, slots = input_batch.num_reqs, input_batch.idx_mapping
        if num_speculative_tokens == 0:
            return self._drafted.token_ids[:num_requests, 1:]
        assert self.step.positions is not None
        rows = StepRows(
            slots,
            input_batch.cu_num_logits,
            input_batch.logits_indices,
            self.step.positions,
            num_sampled,
            self.step.nodes,
        )
        states = RequestStates(last_sampled, temperature, seeds, self.is_linear.gpu, self.is_foreseen.gpu)
        outputs = None if self.layer_outputs is None else self.layer_outputs.rows
        kernels.backend().draft_starts(
            last_hidden_states, outputs, rows, states, self.drafts_chains_only, self._starts.first(num_requests)
        )
        self._run_draft(num_requests)
        drafted = self._drafted.first(num_requests)
        if not dummy_run:
            self.trees.store(slots, drafted, num_sampled)
        return drafted.token_ids[:, 1:]

    def _noise(self, starts: DraftStarts, depth: int) -> torch.Tensor:
        """Return the noise of the draws at a depth, [num_requests, rows]."""
        return kernels.backend().sampling_noise(
            starts.positions, starts.temperatures, starts.seeds, self.drafted_ids, depth
        )

    def _run_draft(self, num_requests: int) -> None:
        """Replay the graph of a batch of this size, or draft without where there is none."""
        # vLLM profiles the runner before it has a KV cache and graphs
        if self.cudagraph_manager is not None:
            graph = self.cudagraph_manager.dispatch(num_requests, num_requests, 1, 0)
            if graph.cg_mode == CUDAGraphMode.FULL:
                self.cudagraph_manager.run_fullgraph(graph)
                return
        self._draft(num_requests)

    def _draft(self, num_requests: int) -> None:
        """Fill the first rows of `_drafted`."""
        starts, drafted = self._starts.first(num_requests), self._drafted.first(num_requests)
        draft(self.model, self.embed, starts, self.options.shape, drafted, partial(self._noise, starts), self.choose)
