"""The drafter inside vLLM's worker: loads it beside the target, and proposes trees or chains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.logger import init_logger

from vllm_redrafter.adapter import loading
from vllm_redrafter.adapter.config import ReDrafterOptions
from vllm_redrafter.adapter.foresight import KnownDraws
from vllm_redrafter.adapter.searcher import SEVERAL, Searcher
from vllm_redrafter.adapter.tree_batch import DraftTree, best_tree, path_segments
from vllm_redrafter.core.beam_search import Candidates
from vllm_redrafter.core.drafter import Embed, ReDrafter
from vllm_redrafter.kernels.cpu_beam_search import PackedDrafter
from vllm_redrafter.kernels.cpu_library import NotCompiledError

logger = init_logger(f"vllm.{__name__}")


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
        self.is_for_several = vllm_config.scheduler_config.max_num_seqs > 1

    def load_model(self, target: nn.Module) -> None:
        """Load the drafter and borrow the target's embedding, and its head where the drafter is tied to it."""
        drafter, embed, table, num_parameters = loading.load_beside(target, Path(self.options.model), self.dtype)
        self.hold(drafter, embed, table)
        size = num_parameters / 1e6
        logger.info(
            "Loaded the drafter %s (%.1fM parameters, %s; %s)", self.options.model, size, self.dtype, self._for_one
        )

    def hold(self, drafter: ReDrafter, embed: Embed, table: torch.Tensor | None = None) -> None:
        """Draft with this drafter.

        Args:
            table: what `embed` looks up, [tokens, hidden_size], where it does no more than that.
        """
        self.drafter, self.embed = drafter, embed
        self.drafted_ids = drafter.drafted_ids(torch.device("cpu"))
        shape = self.options.shape
        num_candidates = self.options.num_speculative_tokens if shape.width > 1 else 1
        # ranks that search differently may round differently, and must draft alike
        packed = _packed(drafter, table) if self.has_one_rank else None
        self._for_one = self._for_several = Searcher(drafter, embed, shape, num_candidates, packed)

    def tune(self, step_seconds: Callable[[int], float]) -> None:
        """Search one beam where the others cost more than they bring.

        What fewer beams lose is acceptance, never output. With more than one rank nothing is chosen: ranks that choose
        differently draft differently.

        Args:
            step_seconds: the target's time for so many rows.
        """
        if not self.has_one_rank or self.options.beam_width == 1:
            return
        all_beams, num_nodes = self._for_one, self.options.num_speculative_tokens

        def search_for(num_requests: int) -> Searcher:
            worth = _worth_of_beams(num_nodes) * step_seconds(num_requests + num_nodes)
            return all_beams.narrowed(num_requests, worth)

        self._for_one = self._for_several = search_for(1)
        if self.is_for_several:
            self._for_several = search_for(SEVERAL)
        logger.info("Drafting for one request: %s; for several: %s", self._for_one, self._for_several)

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


def _worth_of_beams(num_nodes: int) -> float:
    """Return the part of a step's tokens that beams beside the first bring, with trees of so many nodes.

    On stories, the best 4 nodes of one beam hold as many tokens as those of four beams, the best 8 hold 3% fewer, the
    best 16 hold 8% fewer and the best 32 hold 11% fewer.
    """
    return float(np.interp(num_nodes, (4, 8, 16, 32), (0.0, 0.03, 0.08, 0.11)))


def _packed(drafter: ReDrafter, table: torch.Tensor | None) -> PackedDrafter | None:
    """Return the drafter for our kernel, or None where that does not compute it."""
    if table is None:
        return None
    try:
        return PackedDrafter(drafter, table)
    except (NotCompiledError, ValueError) as error:
        logger.warning("Drafts are searched for operation by operation, which takes longer: %s", error)
        return None
