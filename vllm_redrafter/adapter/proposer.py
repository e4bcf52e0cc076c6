"""The drafter inside vLLM's worker: loads it beside the target, and proposes trees or chains."""

from __future__ import annotations

import copy
import statistics
import time
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
from vllm_redrafter.adapter.tree_batch import DraftTree, best_tree, path_segments
from vllm_redrafter.core import beam_search
from vllm_redrafter.core.beam_search import SHARPNESS, Candidates, Foresight
from vllm_redrafter.core.drafter import Embed, ReDrafter

logger = init_logger(f"vllm.{__name__}")

_LARGE = 1_000_000
"""Parameters above which a drafter no longer stays in a core's cache between steps."""

_NO_FLOOR = float("-inf")

_EVICTED_BYTES = 1 << 26
"""What is read before a search is timed: a step reads the target's weights, and leaves the drafter's cold."""


class ReDrafterProposer:
    """What vLLM builds for `method="custom_class"`; our runner calls `search` and `trees`."""

    drafter: ReDrafter
    drafted_ids: torch.Tensor
    """The target's id for every row of the drafter's head, [head_size]."""

    def __init__(self, vllm_config: Any) -> None:
        self.options = ReDrafterOptions.of(vllm_config)
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        self.has_one_rank = vllm_config.parallel_config.tensor_parallel_size == 1
        self.is_compiling = vllm_config.compilation_config.mode != CompilationMode.NONE
        self.embed: Embed = nn.Identity()
        self._program: Callable[..., Candidates] | None = None

    def load_model(self, target: nn.Module) -> None:
        """Load the drafter and borrow the target's embedding, and its head where the drafter is tied to it."""
        self.drafter, self.embed, num_parameters = loading.load_beside(target, Path(self.options.model), self.dtype)
        self.drafted_ids = self.drafter.drafted_ids(torch.device("cpu"))
        can_choose = self.has_one_rank and self.dtype != torch.bfloat16
        if num_parameters > _LARGE and can_choose and torch.cpu._is_avx512_bf16_supported():
            self._choose_precision()
        if self.is_compiling and self.has_one_rank:
            self._compile()
        logger.info(
            "Loaded the drafter %s (%.1fM parameters, %s)", self.options.model, num_parameters / 1e6, self.dtype
        )

    def _choose_precision(self) -> None:
        """Hold the drafter's weights in 32, 16 or 8 bits, whichever is fastest: less to read is not always quicker.

        What rounding loses is acceptance, never output. With more than one rank the choice is not taken: ranks that
        choose differently draft differently.
        """
        choices = [
            (self.drafter, self.dtype),
            (copy.deepcopy(self.drafter).to(torch.bfloat16), torch.bfloat16),
            (int8.quantized(self.drafter), torch.bfloat16),
        ]
        seconds = []
        for self.drafter, self.dtype in choices:
            seconds.append(search_seconds(self))
        self.drafter, self.dtype = choices[seconds.index(min(seconds))]

    @torch.inference_mode()
    def _compile(self) -> None:
        """Let torch.compile make one program of a whole search for one request, where that is faster.

        A search is some twenty small operations per depth: called one by one, they take longer than what they compute.
        The program always looks as deep as it may. With more than one rank there is none: what is rounded otherwise may
        be drafted otherwise, and ranks must draft alike.
        """

        def whole(hidden: torch.Tensor, init_ids: torch.Tensor, noise: torch.Tensor) -> Candidates:
            return self._search(hidden, init_ids, _NO_FLOOR, lambda depth, logits: logits + noise[depth])

        seconds = search_seconds(self)
        # a wrapper in Python would be half of what is to be saved
        self._program = torch.compile(whole, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})
        self._no_noise = torch.zeros(self.options.draft_length, len(self.drafted_ids))
        if search_seconds(self) >= seconds:
            self._program = None

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Not called: vLLM's hook for custom proposers is not given hidden states, our runner's own is."""
        raise NotImplementedError("ReDrafterProposer is driven by vllm_redrafter.adapter.runner")

    @torch.inference_mode()
    def search(
        self,
        hidden: torch.Tensor,  # [batch, input_size]
        init_ids: torch.Tensor,  # [batch]
        floor: float,
        foresight: KnownDraws | None = None,
    ) -> Candidates:
        """Return the best continuations, looking no deeper once all have a cumulative log-probability below `floor`.

        For one request they may be looked for to the full depth.

        Args:
            foresight: of what sampling will draw; None where nothing is sampled.
        """
        if self._program is not None and len(init_ids) == 1:
            noise = self._no_noise if foresight is None else foresight.noise_alone()
            if noise is not None:
                return self._program(hidden.to(self.dtype), init_ids, noise)
        return self._search(hidden, init_ids, floor, foresight)

    def _search(
        self, hidden: torch.Tensor, init_ids: torch.Tensor, floor: float, foresight: Foresight | None
    ) -> Candidates:
        return beam_search.search(
            self.drafter,
            self.embed,
            hidden.to(self.dtype),
            init_ids,
            self.options.shape,
            num_candidates=self.options.num_speculative_tokens if self.options.beam_width > 1 else 1,
            floor=floor,
            sharpness=SHARPNESS,
            foresight=foresight,
        )

    def trees(self, candidates: Candidates, budgets: Sequence[int], linear: Sequence[bool]) -> list[DraftTree]:
        """Return the best `budgets[i]` nodes of request i, or its best path where `linear[i]` asks for a chain."""
        trees = []
        columns = (column.tolist() for column in candidates)
        for tokens, parents, log_probs, budget, as_chain in zip(*columns, budgets, linear, strict=True):
            tree = best_tree(tokens, parents, log_probs, budget)
            trees.append(tree.first(path_segments(tree.parents)[0][1]) if as_chain else tree)
        return trees


@torch.inference_mode()
def search_seconds(proposer: ReDrafterProposer) -> float:
    """Return the time of a search for one request, the drafter's weights cold."""
    hidden = torch.zeros(1, proposer.drafter.config.input_size)
    others = torch.ones(_EVICTED_BYTES // 4)
    seconds = []
    # the first time, something may be compiled
    for _ in range(8):
        others.sum()
        started = time.perf_counter()
        proposer.search(hidden, torch.zeros(1, dtype=torch.int64), _NO_FLOOR)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
