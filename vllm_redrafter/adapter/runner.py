"""vLLM's V1 model runner with token trees.

What a step does differently, in the order in which a step does it:

    execute_model              decides whether there is anything to do for drafts: if not, the step is vLLM's own,
                               and nothing that follows here is done
    _update_states             a generator for every request that samples
    _prepare_inputs            which trees this step verifies; node i of a tree stands at position context + depth
    _build_attention_metadata  the attention of branching trees
    _sample                    the acceptance walk, and the commit of the accepted paths
    propose_draft_token_ids    the next trees, from the hidden states at the last accepted nodes
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Sequence, Set
from typing import Any, TypeVar

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.sampling_params import SamplingType
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_redrafter.adapter import attention, attention_pass, foresight, step_times, tree_batch
from vllm_redrafter.adapter.attention import TreeAttention, TreeAttentionMetadata
from vllm_redrafter.adapter.attention_pass import TreePass
from vllm_redrafter.adapter.attention_rounds import TreeRounds
from vllm_redrafter.adapter.budget import Budget
from vllm_redrafter.adapter.costs import StepRecord
from vllm_redrafter.adapter.foresight import KnownDraws
from vllm_redrafter.adapter.proposer import ReDrafterProposer
from vllm_redrafter.adapter.stats import Stats
from vllm_redrafter.adapter.target_matrices import TargetMatrices
from vllm_redrafter.adapter.tree_batch import DraftTree, TreeBatch
from vllm_redrafter.adapter.verification import Verifier, Walk
from vllm_redrafter.core.beam_search import Candidates
from vllm_redrafter.kernels.cpu_tree_attention import LayerCache

Number = TypeVar("Number", int, float)

_NOBODY: frozenset[int] = frozenset()


class TreeModelRunner(CPUModelRunner):
    """Schedules, verifies and proposes token trees as vLLM does draft chains: N nodes are N draft tokens."""

    drafter: ReDrafterProposer
    speculative_config: Any

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        # vLLM leaves min_p and logit_bias out when it speculates; our acceptance honours them
        processors = (MinPLogitsProcessor, LogitBiasLogitsProcessor, MinTokensLogitsProcessor)
        self.input_batch.logitsprocs = LogitsProcessors(kind(vllm_config, device, False) for kind in processors)
        self.use_aux_hidden_state_outputs = bool(self.drafter.options.fused_layers)
        self.stats = Stats()
        self._verifier = Verifier(self.sampler)
        self._proposed: dict[str, DraftTree] = {}
        self._batch = TreeBatch([], [], [], 0, 0, 0, 0)
        self._query_ends: list[int] = []
        self._tree_metadata: list[TreeAttentionMetadata] = []
        self._caches_served: dict[str, LayerCache] = {}
        self._last_rows: list[int] = []
        self._discarded = _NOBODY
        self._budget: Budget | None = None
        self._step_started: float | None = None
        """None where a step is not timed."""
        self._forward_seconds = 0.0
        self._draft_seconds: float | None = None
        self._foretold_seconds: float | None = None
        self._next_foretold_seconds: float | None = None
        """Those of the step that verifies what is being drafted."""
        self._decoding: Set[str] = frozenset()
        """The requests of a step, if none of them is at its prompt."""
        self._is_plain = False
        """Whether the step neither verifies nor drafts anything."""
        self._steps_to_skip = 0
        """Steps after it that are decided to be like it, as long as they are of the same requests."""
        self._num_sampled = 0
        """Requests that are not greedy, when it was last decided whether to draft."""
        self._resumed: Set[str] = frozenset()
        """Requests that were preempted: what they had before may be computed once more at any time."""
        self._floor: float | None = None
        """Down to where to search after a step that verifies nothing, if that was worth saying before it."""
        self._has_foresight = foresight.is_possible(self.sampler)
        self._matrices = TargetMatrices(
            self.drafter.options.pack_target,
            reserved_bytes=self.cache_config.kv_cache_memory_bytes or 0,
            num_processes=self.parallel_config.world_size,
        )

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load target and drafter as vLLM does, and pack the target's matrices for the rows of trees."""
        with self._matrices.packed():
            super().load_model(*args, **kwargs)
        if self.lora_config is None:  # adapters want to know of requests before they are asked
            self._matrices.forget_embeddings(
                self.model, torch.zeros(1, self.model_config.get_hidden_size(), dtype=self.dtype)
            )
        attention.check(get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase))

    def calibrate(self) -> None:
        """Choose how the target multiplies, and find out what an automatic budget needs to know of this machine."""
        self._matrices.tune()
        for group in itertools.chain.from_iterable(self.attn_groups):
            layers = {name: self.compilation_config.static_forward_context[name] for name in group.layer_names}
            self._caches_served |= attention_pass.caches_served(group.get_metadata_builder(0), layers)
        options = self.drafter.options
        if options.budget == "auto":
            most_rows = self.max_num_reqs * (1 + options.num_speculative_tokens)
            times = step_times.measure(self, most_rows, lambda own: bool(_from_first_rank([int(own)])[0]))
            self._budget = Budget(times, options.num_speculative_tokens, options.draft_length)
            self.drafter.tune(times.of)

    def describe(self) -> dict[str, Any]:
        """Return the statistics, and what the budget has learnt."""
        return self.stats.as_dict() | {"budgets": {} if self._budget is None else self._budget.as_dict()}

    def _get_eagle3_aux_layers_from_config(self) -> tuple[int, ...]:
        return self.drafter.options.layers_handed_out

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """Run the forward pass as vLLM does; its time tells the budget what a step costs."""
        scheduled = scheduler_output.num_scheduled_tokens
        num_rows = scheduler_output.total_num_scheduled_tokens
        if (
            self._steps_to_skip
            and num_rows == len(scheduled)
            and not scheduler_output.scheduled_new_reqs
            and scheduled.keys() == self._decoding
        ):
            self._steps_to_skip -= 1
            self._step_started = None
            self.stats.count_skipped(num_rows)
            return self._left_alone(super().execute_model, scheduler_output, intermediate_tensors)
        now = time.perf_counter()
        self._learn_from_last_step(scheduled.keys(), now)
        num_drafts = sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
        # every request has one token more than drafts; only those that are at their prompt have more
        is_decoding = num_rows == len(scheduled) + num_drafts
        self._decoding = scheduled.keys() if is_decoding else frozenset()
        self._step_started = now
        self._foretold_seconds, self._next_foretold_seconds = self._next_foretold_seconds, None
        self._draft_seconds = None
        self._decide_ahead(scheduler_output)
        output = self._left_alone(super().execute_model, scheduler_output, intermediate_tensors)
        self._forward_seconds = time.perf_counter() - now
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Draw tokens and draft the next ones as vLLM does, or not draft at all."""
        return self._left_alone(super().sample_tokens, grammar_output)

    def _decide_ahead(self, scheduler_output: Any) -> None:
        """Decide whether to draft after a step that verifies nothing and in which every request emits a token."""
        scheduled, cached = scheduler_output.num_scheduled_tokens, scheduler_output.scheduled_cached_reqs
        # a prompt may come token by token, and so may what is computed once more
        self._resumed = (self._resumed | cached.resumed_req_ids) - scheduler_output.finished_req_ids
        self._floor, self._is_plain, self._steps_to_skip = None, False, 0
        is_past_prompts = self._decoding and not scheduler_output.scheduled_new_reqs and all(cached.num_output_tokens)
        if not is_past_prompts or self._resumed or scheduler_output.scheduled_spec_decode_tokens:
            return
        self._floor = self._agreed_floor(scheduled)
        if self._floor is not None:
            return
        self._is_plain = True
        self._batch = tree_batch.of_roots(len(scheduled))
        self._forget_proposals(scheduler_output)
        self.stats.count_skipped(len(scheduled))
        if self._budget is not None:
            (self._steps_to_skip,) = _from_first_rank([self._budget.skip_steps(len(scheduled), self._num_sampled)])

    def _left_alone(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of vLLM's runner on one that is not ours, if this step has nothing to do with drafts.

        In every step of an engine that may speculate vLLM prepares and looks for drafts, and so do we: a twentieth of
        the time of a small model's step. Large batches mostly have none.
        """
        if not self._is_plain:
            return method(*arguments)
        ours = self.__class__, self.speculative_config
        self.__class__, self.speculative_config = CPUModelRunner, None
        try:
            return method(*arguments)
        finally:
            self.__class__, self.speculative_config = ours

    def _forget_proposals(self, scheduler_output: Any) -> None:
        """Forget the trees of requests that are scheduled, with or without them, or have ended."""
        if self._proposed:
            for request in (*scheduler_output.num_scheduled_tokens, *scheduler_output.finished_req_ids):
                self._proposed.pop(request, None)

    def _learn_from_last_step(self, scheduled: Set[str], now: float) -> None:
        """Tell the budget what it took, if nothing but decoding these requests was done from its start until now."""
        budget, started = self._budget, self._step_started
        if budget is None or started is None or not self._decoding or self._decoding != scheduled:
            return
        if self._is_plain and not budget.wants_plain_step(len(scheduled), self._num_sampled):
            return
        budget.observe_step(
            StepRecord(
                len(self._batch.trees),
                self._batch.num_nodes,
                self._batch.num_branching > 0,
                self._forward_seconds,
                self._draft_seconds,
                now - started,
                self._foretold_seconds,
                self._num_sampled,
            )
        )

    def _update_states(self, scheduler_output: Any) -> Any:
        """Let every request that samples draw from a generator of its own, also where it has no seed.

        Trees are built from what will be drawn, so whether a walk ends hangs on it. All requests without a seed share
        one generator in vLLM, of which a walk that ends before others skips numbers: those left were a selection.
        """
        corrections = super()._update_states(scheduler_output)
        for new_request in scheduler_output.scheduled_new_reqs:
            state = self.requests[new_request.req_id]
            if state.generator is None and not is_greedy(state.sampling_params):
                state.generator = foresight.own_generator()
                place = self.input_batch.req_id_to_index[new_request.req_id]
                self.input_batch.generators[place] = state.generator
        return corrections

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray[Any, Any]) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        started = time.perf_counter()
        drafts = scheduler_output.scheduled_spec_decode_tokens
        self._query_ends = num_scheduled_tokens.cumsum().tolist()
        self._batch = tree_batch.assemble(self._proposed, self.input_batch.req_ids, drafts, self._query_ends)
        self._forget_proposals(scheduler_output)
        if self._batch.num_branching:
            self._place_nodes()
        self.stats.adapter_seconds += time.perf_counter() - started
        return prepared

    def _place_nodes(self) -> None:
        """Move every node to the position of its depth: vLLM has put node i where a chain's would be."""
        moves = [0] * self._query_ends[-1]
        for root_row, tree in zip(self._batch.root_rows, self._batch.trees, strict=True):
            for node, depth in enumerate(tree.depths):
                moves[root_row + node] = depth - node
        self.positions[: len(moves)] += torch.tensor(moves)

    def _calc_spec_decode_metadata(
        self, num_draft_tokens: np.ndarray[Any, Any], cu_num_scheduled_tokens: np.ndarray[Any, Any]
    ) -> SpecDecodeMetadata:
        """Return the rows that logits are computed for, and leave out what vLLM's own acceptance would need."""
        num_logits = num_draft_tokens + 1
        rows = np.arange(num_logits.sum()) + np.repeat(cu_num_scheduled_tokens - num_logits.cumsum(), num_logits)
        unused = torch.empty(0)
        return SpecDecodeMetadata(
            unused, num_draft_tokens.tolist(), unused, unused, unused, unused, logits_indices=torch.from_numpy(rows)
        )

    def _build_attention_metadata(self, num_tokens: int, num_reqs: int, max_query_len: int, **kwargs: Any) -> Any:
        metadata, common = super()._build_attention_metadata(num_tokens, num_reqs, max_query_len, **kwargs)
        self._tree_metadata = []
        if not self._attends_itself() or self._query_ends[-1] != num_tokens:
            return metadata, common
        started = time.perf_counter()
        num_computed = self.input_batch.num_computed_tokens_cpu[:num_reqs].tolist()
        for group in itertools.chain.from_iterable(self.attn_groups):
            names = group.layer_names
            stock, builder = metadata[names[0]], group.get_metadata_builder(0)
            trees = self._tree_attention(stock, builder, num_computed, names[0] in self._caches_served)
            with_trees = TreeAttentionMetadata.of(stock, trees, names)
            metadata.update(dict.fromkeys(names, with_trees))
            self._tree_metadata.append(with_trees)
        self.stats.adapter_seconds += time.perf_counter() - started
        return metadata, common

    def _attends_itself(self) -> bool:
        """Return whether this step needs more than the stock kernel, or is served by ours for less."""
        return self._batch.num_branching > 0 or (self._batch.num_nodes > 0 and bool(self._caches_served))

    def _tree_attention(self, stock: Any, builder: Any, num_computed: list[int], in_one_pass: bool) -> TreeAttention:
        batch, ends = self._batch, self._query_ends
        ancestors = batch.ancestors(ends) if in_one_pass else None
        if ancestors is None:
            return TreeRounds(stock, builder, batch.segments(ends, num_computed))
        return TreePass(stock, builder, self._caches_served, batch.requests(ends, num_computed), ancestors)

    def _sample(self, logits: torch.Tensor, spec_decode_metadata: Any) -> Any:
        started = time.perf_counter()
        batch = self._batch
        discarded = self._discarded = self._find_discarded()
        sampling_metadata = self.input_batch.sampling_metadata
        outputs = self.input_batch.req_output_token_ids
        output, walk = self._verifier.verify(batch, logits, sampling_metadata, outputs, discarded)
        self._commit(walk)
        self._last_rows = [row + nodes[-1] for row, nodes in zip(batch.root_rows, walk.nodes, strict=True)]
        self._count(walk, discarded)
        self.stats.verify_seconds += time.perf_counter() - started
        return output

    def _commit(self, walk: Walk) -> None:
        """Move the keys and values of accepted nodes that are not on their tree's first path to their slots."""
        if not self._tree_metadata:
            return
        rows, slot_rows = [], []
        for root_row, nodes in zip(self._batch.root_rows, walk.nodes, strict=True):
            # on the first path a node's index is its depth, and its keys and values are in place
            moved = [(node, depth) for depth, node in enumerate(nodes) if node > depth]
            rows += [root_row + node for node, _ in moved]
            slot_rows += [root_row + depth for _, depth in moved]
        if rows:
            self.stats.num_commits += 1
            layers = self.compilation_config.static_forward_context
            for metadata in self._tree_metadata:
                attention.commit(layers, metadata, rows, slot_rows)
        self._tree_metadata = []

    def _count(self, walk: Walk, discarded: frozenset[int]) -> None:
        """Count what was verified, for the statistics and for the budget."""
        stats, batch, all_outputs = self.stats, self._batch, self.input_batch.req_output_token_ids
        stats.num_engine_steps += 1
        stats.num_truncated_trees += batch.num_truncated
        stats.num_chain_fallbacks += batch.num_replaced
        stats.num_branching_trees += batch.num_branching
        # requests without outputs are left out: the first token comes with the prompt, and nothing was drafted for it
        if not batch.num_nodes:
            num_waiting = all_outputs.count([]) + sum(bool(all_outputs[index]) for index in discarded)
            stats.count_plain(len(all_outputs) - num_waiting)
            return
        for index, outputs in enumerate(all_outputs):
            if not outputs or index in discarded:
                continue
            request = self.requests[self.input_batch.req_ids[index]]
            tree, tokens, nodes = batch.trees[index], walk.tokens[index], walk.nodes[index]
            depth = len(nodes) - 1
            emitted = num_emitted(tokens, len(request.output_token_ids), request.sampling_params)
            stats.count_accepted(len(tree.token_ids), depth, emitted, nodes[depth] == depth)
            if self._budget is not None and tree.scores:
                accepted = [node in nodes for node in range(1, len(tree.parents))]
                self._budget.observe_acceptance(tree.scores, accepted, is_greedy(request.sampling_params))

    def _bookkeeping_sync(self, scheduler_output: Any, sampler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM rewinds the generators of discarded rows, which CPU generators cannot do; ours were not drawn from
        if not self._discarded:
            return super()._bookkeeping_sync(scheduler_output, sampler_output, *args, **kwargs)
        generators = self.input_batch.generators
        hidden = {index: generators.pop(index) for index in self._discarded if index in generators}
        try:
            return super()._bookkeeping_sync(scheduler_output, sampler_output, *args, **kwargs)
        finally:
            generators.update(hidden)

    def _find_discarded(self) -> frozenset[int]:
        """Return the requests in the middle of their prompt: vLLM drops what is sampled for them."""
        is_discarded = self.discard_request_mask.np[: self.input_batch.num_reqs]
        return frozenset(np.nonzero(is_discarded)[0].tolist()) if is_discarded.any() else _NOBODY

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # the drafter has no positions; stock vLLM would propose zeros to the whole batch near max_model_len
        return True

    def propose_draft_token_ids(
        self,
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],
        sampling_metadata: Any,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        """Return the nodes of every request's next tree, in the order of the batch, and remember the trees.

        Nothing at all where nothing is drafted: vLLM looks at every request for which it is told something.
        """
        active = [index for index, tokens in enumerate(sampled_token_ids) if tokens]
        if not active:
            return []
        started = time.perf_counter()
        request_ids = [self.input_batch.req_ids[index] for index in active]
        floor = self._agreed_floor(request_ids) if self._floor is None else self._floor
        if floor is None:
            self.stats.num_skipped_drafts += 1
            return []
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        parameters = [self.requests[request].sampling_params for request in request_ids]
        greedy = [is_greedy(each) for each in parameters]
        init_ids = torch.tensor([sampled_token_ids[index][-1] for index in active])
        rows = torch.tensor([self._last_rows[index] for index in active])
        handed_over = torch.cat([states[rows] for states in (hidden_states, *(aux_hidden_states or ()))], dim=-1)
        candidates = self.drafter.search(handed_over, init_ids, floor, self._foresee(active, parameters))
        candidates, budgets = self._agreed_choice(candidates, greedy)
        linear = [each.structured_outputs is not None for each in parameters]
        trees = self.drafter.trees(candidates, budgets, linear)
        for index, request, tree in zip(active, request_ids, trees, strict=True):
            drafts[index] = tree.token_ids
            self._proposed[request] = tree
        self.stats.num_linear_drafts += sum(linear)
        self._draft_seconds = time.perf_counter() - started
        self.stats.draft_seconds += self._draft_seconds
        return drafts

    def _foresee(self, active: Sequence[int], parameters: Sequence[Any]) -> KnownDraws | None:
        """Return what is known of the sampler's next draws, or None where that is nothing.

        Args:
            active: the requests drafted for, by their places in the batch.
        """
        if not self._has_foresight:
            return None
        return foresight.of(
            self.input_batch.generators,
            dict(zip(active, parameters, strict=True)),
            self.drafter.options.draft_length,
            self.drafter.drafted_ids,
        )

    def _agreed_floor(self, request_ids: Collection[str]) -> float | None:
        """Return the log-probability down to which to search, the same on all ranks, or None to draft nothing."""
        if self._budget is None:
            return float("-inf")
        floor = math.nan
        greedy = [is_greedy(self.requests[each].sampling_params) for each in request_ids]
        self._num_sampled = greedy.count(False)
        if self._budget.should_draft(len(greedy), self._num_sampled):
            floor = self._budget.floor(greedy)
        (agreed,) = _from_first_rank([floor])
        return None if math.isnan(agreed) else agreed

    def _agreed_choice(self, candidates: Candidates, greedy: list[bool]) -> tuple[Candidates, list[int]]:
        """Return what every request may verify, the same on all ranks: the best so many of which candidates."""
        if self._budget is None:
            return candidates, [self.drafter.options.num_speculative_tokens] * len(greedy)
        log_probs = candidates.log_probs.tolist()
        paths = [tree_batch.best_path(parents) for parents in candidates.parents.tolist()]
        trees = [sorted(row, reverse=True) for row in log_probs]
        chains = [[row[place] for place in path] for row, path in zip(log_probs, paths, strict=True)]
        choice = self._budget.choose(trees, chains, greedy)
        self._next_foretold_seconds = choice.forward_seconds
        as_chains, *budgets = _from_first_rank([int(choice.as_chains), *choice.num_nodes])
        return (tree_batch.along(candidates, paths) if as_chains else candidates), budgets


def is_greedy(parameters: Any) -> bool:
    """Return whether a request's tokens are the target's best ones."""
    return bool(parameters.sampling_type == SamplingType.GREEDY)


def num_emitted(tokens: list[int], num_output_tokens: int, parameters: Any) -> int:
    """Return how many of a step's tokens the request will keep, stop strings aside, which are matched elsewhere."""
    ends = [index + 1 for index, token in enumerate(tokens) if token in parameters.all_stop_token_ids]
    room = len(tokens) if parameters.max_tokens is None else parameters.max_tokens - num_output_tokens
    return min(len(tokens), room, *ends)


def _from_first_rank(decision: list[Number]) -> list[Number]:
    """Return the first rank's numbers: decisions that rest on times differ between ranks, and drafts must not."""
    group = get_tp_group()
    if group.world_size == 1:
        return decision
    agreed: list[Number] = group.broadcast(torch.tensor(decision, dtype=torch.float64), src=0).tolist()
    return [type(own)(number) for own, number in zip(decision, agreed, strict=True)]
