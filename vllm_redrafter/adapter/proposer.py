"""The drafter inside vLLM's worker: loads it beside the target, and proposes trees or chains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config.compilation import CompilationMode
from vllm.logger import init_logger

from vllm_redrafter.adapter import int8, loading
from vllm_redrafter.adapter.config import ReDrafterOptions
from vllm_redrafter.adapter.foresight import KnownDraws
from vllm_redrafter.adapter.searcher import SEVERAL, Searcher
from vllm_redrafter.adapter.tree_batch import DraftTree, best_tree, path_segments
from vllm_redrafter.core.beam_search import Candidates
from vllm_redrafter.core.drafter import Embed, ReDrafter
from vllm_redrafter.kernels.cpu_library import NotCompiledError

logger = init_logger(f"vllm.{__name__}")

_LARGE = 1_000_000
"""Parameters above which a drafter no longer stays in a core's cache between steps."""

_LOST_BY_ROUNDING = 0.04
"""Part of a step that a copy with rounded weights must save: 8 bits cost 1.4% of the tokens on 48 held-out stories, and
4% on the openings of `bench speed`."""

_WORTH_OF_BEAMS = 0.0025
"""Part of a step's tokens, per node of the budget, that beams beside the first bring: on stories, the best 8 nodes of
one beam hold 3% fewer tokens than those of four, the best 16 hold 8%, the best 32 hold 11%; the best 4 hold as many."""


class ReDrafterProposer:
    """What vLLM builds for `method="custom_class"`; our runner calls `search` and `trees`."""

    drafter: ReDrafter
    embed: Embed
    drafted_ids: torch.Tensor
    """The target's id for every row of the drafter's head, [head_size]."""

    def __init__(self, vllm_config: Any) -> None:
        self.options = ReDrafterOptions.of(vllm_config)
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        self.has_one_rank = vllm_config.parallel_config.tensor_parallel_size == 1
        self.is_compiling = vllm_config.compilation_config.mode != CompilationMode.NONE
        self.is_for_several = vllm_config.scheduler_config.max_num_seqs > 1

    def load_model(self, target: nn.Module) -> None:
        """Load the drafter and borrow the target's embedding, and its head where the drafter is tied to it."""
        drafter, embed, num_parameters = loading.load_beside(target, Path(self.options.model), self.dtype)
        self.hold(drafter, embed)
        is_large = num_parameters > _LARGE and self.dtype != torch.bfloat16
        self._may_pack = is_large and self.dtype == torch.float32 and self.options.pack_target is not False
        if is_large and self.has_one_rank and torch.cpu._is_avx512_bf16_supported():
            self._copies += [
                self._searcher(copy.deepcopy(drafter).to(torch.bfloat16), torch.bfloat16),
                self._searcher(int8.quantized(drafter), torch.bfloat16),
            ]
        logger.info(
            "Loaded the drafter %s (%.1fM parameters, %s)", self.options.model, num_parameters / 1e6, self.dtype
        )

    def hold(self, drafter: ReDrafter, embed: Embed) -> None:
        """Draft with this drafter, in the target's precision."""
        self.drafter, self.embed = drafter, embed
        self.drafted_ids = drafter.drafted_ids(torch.device("cpu"))
        self._for_one = self._for_several = self._searcher(drafter, self.dtype)
        self._copies = [self._for_one]
        self._may_pack = False

    def tune(self, step_seconds: Callable[[int], float]) -> None:
        """Choose how to search by what is fastest here: the weights' precision, beams, compiled or not.

        What rounding and fewer beams lose is acceptance, never output. With more than one rank nothing is chosen: ranks
        that choose differently draft differently, and what is compiled may round differently.

        Args:
            step_seconds: the target's time for so many rows, asked for where there is a choice: beside it, rounding may
                save less than it costs, and where the budget is automatic, the beams asked for may cost more than they
                bring, so that one is searched.
        """
        if not self.has_one_rank:
            return
        self._for_one = self._for_several = self._tuned(1, step_seconds)
        if self.is_for_several:
            self._for_several = self._tuned(SEVERAL, step_seconds)
        self._copies = []
        logger.info("Drafting for one request: %s; for several: %s", self._for_one, self._for_several)

    def _tuned(self, num_requests: int, step_seconds: Callable[[int], float]) -> Searcher:
        searchers = self._copies
        if self._may_pack and num_requests * self.options.beam_width > 1:
            searchers = [self._with_quicker_products(searcher, num_requests) for searcher in searchers]
        if self.options.budget == "auto" and self.options.beam_width > 1:
            worth = _WORTH_OF_BEAMS * self.options.num_speculative_tokens * step_seconds(num_requests)
            exact, *rounded = searchers
            narrowed = exact.narrowed(num_requests, worth, will_compile=self.is_compiling)
            if narrowed is not exact:
                searchers = [narrowed, *(searcher.one_beam(num_requests) for searcher in rounded)]

        def cost(searcher: Searcher) -> float:
            is_rounded = searcher.dtype != self.dtype
            lost = _LOST_BY_ROUNDING * step_seconds(num_requests) if is_rounded else 0.0
            return searcher.products_seconds(num_requests, will_compile=self.is_compiling) + lost

        # but for their products they are alike, and only one search is compiled, which takes longer than all else here
        best = searchers[0] if len(searchers) == 1 else min(searchers, key=cost)
        if self.is_compiling:
            best.compile(num_requests)
        if best.is_compiled(num_requests):
            best.compile(num_requests, truncates=True)
        return best

    def _with_quicker_products(self, searcher: Searcher, num_requests: int) -> Searcher:
        if searcher.dtype != self.dtype:
            return searcher
        try:
            return searcher.packed(num_requests)
        except NotCompiledError as error:
            self._may_pack = False
            logger.warning("The drafter's matrices are not packed: %s", error)
            return searcher

    def _searcher(self, drafter: ReDrafter, dtype: torch.dtype) -> Searcher:
        shape = self.options.shape
        num_candidates = self.options.num_speculative_tokens if shape.width > 1 else 1
        return Searcher(drafter, dtype, self.embed, shape, num_candidates)

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Not called: vLLM's hook for custom proposers is not given hidden states, our runner's own is."""
        raise NotImplementedError("ReDrafterProposer is driven by vllm_redrafter.adapter.runner")

    def search(
        self,
        hidden: torch.Tensor,  # [batch, input_size]
        init_ids: torch.Tensor,  # [batch]
        floor: float,
        foresight: KnownDraws | None = None,
    ) -> Candidates:
        """Return the best continuations, looking no deeper once all have a cumulative log-probability below `floor`.

        Args:
            foresight: of what sampling will draw; None where nothing is sampled.
        """
        searcher = self._for_one if len(init_ids) == 1 else self._for_several
        return searcher.search(hidden, init_ids, floor, foresight)

    def trees(self, candidates: Candidates, budgets: Sequence[int], linear: Sequence[bool]) -> list[DraftTree]:
        """Return the best `budgets[i]` nodes of request i, or its best path where `linear[i]` asks for a chain."""
        trees = []
        columns = (column.tolist() for column in candidates)
        for tokens, parents, log_probs, budget, as_chain in zip(*columns, budgets, linear, strict=True):
            tree = best_tree(tokens, parents, log_probs, budget)
            trees.append(tree.first(path_segments(tree.parents)[0][1]) if as_chain else tree)
        return trees
