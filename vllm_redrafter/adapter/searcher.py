"""Searches for drafts on a CPU: in one call of our kernel, or operation by operation where it does not compute them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from vllm_redrafter.adapter.foresight import KnownDraws
from vllm_redrafter.adapter.timing import least_seconds
from vllm_redrafter.core.beam_search import SHARPNESS, BeamSearch, BeamShape, Candidates
from vllm_redrafter.core.drafter import Embed, ReDrafter
from vllm_redrafter.kernels.cpu_beam_search import CpuBeamSearch, PackedDrafter

SEVERAL = 4
"""Requests that stand for all batches of more than one, where something is timed."""


class Searcher:
    """A search of one shape.

    Args:
        num_candidates: kept per depth; with one beam, 1 makes a chain, and more a tree along one path.
        packed: the drafter for our kernel; None for torch.
    """

    def __init__(
        self, drafter: ReDrafter, embed: Embed, shape: BeamShape, num_candidates: int, packed: PackedDrafter | None
    ) -> None:
        self.drafter = drafter
        self.shape = shape
        self._embed = embed
        self._num_candidates = num_candidates
        self._packed = packed
        self._search = BeamSearch(drafter, embed, shape, num_candidates, SHARPNESS)
        self._kernel = None if packed is None else CpuBeamSearch(packed, shape, num_candidates, SHARPNESS)

    def __str__(self) -> str:
        how = "operation by operation" if self._kernel is None else "in one call"
        return f"{self.shape.width} x {self.shape.length} tokens, {how}"

    @torch.inference_mode()
    def search(
        self,
        hidden: torch.Tensor,  # [batch, input_size]
        init_ids: torch.Tensor,  # [batch]
        floor: float,
        foresight: KnownDraws | None = None,
    ) -> Candidates:
        """Return the best continuations, looking no deeper once all have a cumulative log-probability below `floor`."""
        if self._kernel is None:
            return self._search.run(hidden.to(self.drafter.dtype), init_ids, floor, foresight)
        draws = None if foresight is None else foresight.of_batch(len(init_ids))
        return self._kernel.run(hidden, init_ids, floor, draws)

    def narrowed(self, num_requests: int, most_seconds: float) -> Searcher:
        """Return a search with one beam if all of them take more than so much longer; else this one."""
        shape = self.shape._replace(width=1)
        narrow = Searcher(self.drafter, self._embed, shape, self._num_candidates, self._packed)
        seconds, narrow_seconds = self.seconds_beside(narrow, num_requests)
        return narrow if seconds > narrow_seconds + most_seconds else self

    def seconds_beside(self, other: Searcher, num_requests: int) -> list[float]:
        """Return the least times of searches of this kind and of another one to their full depths, weights cold."""
        return least_seconds(*(each._whole_search(num_requests) for each in (self, other)))

    def _whole_search(self, num_requests: int) -> Callable[[], Candidates]:
        hidden = torch.zeros(num_requests, self.drafter.config.input_size)
        init_ids = torch.zeros(num_requests, dtype=torch.int64)
        return lambda: self.search(hidden, init_ids, -math.inf)
