"""Acceptance under model runner V2: vLLM's sampler draws after every row at once, and the walk picks what counts.

V2 keys its noise by seed, position and token. A node's row is drawn with the position of its depth, so it yields what
decoding without a drafter would yield there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_redrafter import kernels
from vllm_redrafter.adapter.v2.step import Step
from vllm_redrafter.adapter.v2.tree_buffers import TreeBuffers
from vllm_redrafter.adapter.v2.walk_counts import WalkCounts
from vllm_redrafter.core.acceptance import Walk


class TreeSampler:
    """What vLLM calls instead of its rejection sampler where a batch has drafts."""

    enable_adaptive_verification = False
    """What vLLM's warm-up asks for: whether drafts are cut off by how likely they are, which ours are not."""

    def __init__(self, sampler: Any, trees: TreeBuffers, step: Step, positions: torch.Tensor) -> None:
        self.sampler = sampler
        self.trees = trees
        self.step = step
        self.positions = positions  # [max_num_tokens]: the depth counted and not the slot
        self.counts = WalkCounts(trees.parents.shape[1] - 1, positions.device)

    def __call__(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size]
        input_batch: Any,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,  # [num_logits] bool
    ) -> SamplerOutput:
        """Return the tokens that the target emits for every request, [num_reqs, 1 + N] and -1 behind the last.

        Args:
            draft_logits: not needed: the target alone decides, whatever was drafted.
            invalid_drafts: rows of drafts that a grammar could not look at, and that are not to be accepted.
        """
        num_nans = get_num_nans(logits) if self.sampler.compute_nans else None
        logprobs_dims = self.sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        drafted = input_batch.input_ids[input_batch.logits_indices]
        choices, processed = self._draw(logits, input_batch, drafted, logprobs_dims is not None)
        if invalid_drafts is not None:
            drafted = drafted.masked_fill(invalid_drafts, -1)
        trees = (self.trees.parents, input_batch.idx_mapping, input_batch.cu_num_logits)
        walk = kernels.backend().verify_walk(drafted, *trees, choices)
        self.step.nodes = walk.nodes
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            walk.num_accepted + 1,
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        self.counts.add(walk.nodes, *trees)
        logprobs = None
        if logprobs_dims is not None:
            shown = processed if self.sampler.logprobs_mode.startswith("processed") else logits
            logprobs = self._logprobs(shown, walk, input_batch, logprobs_dims)
        return SamplerOutput(
            sampled_token_ids=walk.token_ids,
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _draw(
        self, logits: torch.Tensor, input_batch: Any, drafted: torch.Tensor, return_logprobs: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the target's token after every row, and the logits that they were drawn from.

        Sampling may copy the logits in fp32, so there is a limit to the rows that are drawn at once. Requests are not
        divided: vLLM's kernels count back to their first row.
        """
        ends, positions = input_batch.cu_num_logits_np, self.positions[input_batch.logits_indices]
        most_rows = get_max_chunk_logits(logits.shape[1])
        parts, start = [], 0
        while start < input_batch.num_reqs:
            end = max(start + 1, int(np.searchsorted(ends, ends[start] + most_rows, side="right")) - 1)
            rows = slice(int(ends[start]), int(ends[end]))
            part = self.sampler.sample(
                logits[rows],
                input_batch.expanded_idx_mapping[rows],
                input_batch.idx_mapping[start:end],
                input_batch.idx_mapping_np[start:end],
                positions[rows],
                drafted[rows],
                input_batch.expanded_local_pos[rows],
                input_batch.seq_lens_cpu_upper_bound[start:end].numpy(),
                return_logprobs=return_logprobs,
            )
            parts.append(part)
            start = end
        if len(parts) == 1:
            choices, processed = parts[0]
            return choices, processed
        return torch.cat([choices for choices, _ in parts]), torch.cat([processed for _, processed in parts])

    def _rows(self, input_batch: Any) -> torch.Tensor:
        """Return the logits row of every request's nodes, [num_reqs, 1 + N]; any row behind a request's last."""
        nodes = torch.arange(self.trees.parents.shape[1], device=self.positions.device)
        rows = input_batch.cu_num_logits[:-1, None] + nodes
        return rows.clamp(max=len(input_batch.logits_indices) - 1)

    def _logprobs(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size]
        walk: Walk,
        input_batch: Any,
        dims: tuple[int, int],
    ) -> LogprobsTensors:
        """Return log-probabilities in vLLM's layout: a request's i-th token in its i-th row, whatever its node is.

        Args:
            dims: how many of the best tokens are shown, and of those that a request has named.
        """
        num_logprobs, num_named = dims
        rows = self._rows(input_batch)
        is_emitted = walk.nodes >= 0
        source_rows = rows.gather(1, walk.nodes.clamp(min=0))
        # what was not emitted goes to one row more than there are
        targets = torch.where(is_emitted, rows, len(logits)).flatten()
        emitted_rows = torch.arange(len(logits) + 1, device=logits.device).clamp(max=len(logits) - 1)
        emitted_rows = emitted_rows.scatter(0, targets, source_rows.flatten())[:-1]
        tokens = torch.zeros(len(logits) + 1, dtype=torch.int64, device=logits.device)
        tokens = tokens.scatter(0, targets, walk.token_ids.flatten())[:-1]
        return compute_topk_scores(
            logits[emitted_rows],
            num_logprobs,
            tokens,
            input_batch.cu_num_logits_np.tolist(),
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=input_batch.expanded_idx_mapping,
            max_per_req_token_ids=num_named,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )
