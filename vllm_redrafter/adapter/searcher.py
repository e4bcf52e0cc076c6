"""Searches for drafts on a CPU, compiled where that is faster."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from vllm import SamplingParams
from vllm.logger import init_logger

from vllm_redrafter.adapter import one_row, packed_drafter
from vllm_redrafter.adapter.foresight import KnownDraws
from vllm_redrafter.adapter.packed_drafter import PackedLinear
from vllm_redrafter.adapter.timing import least_seconds, median_seconds
from vllm_redrafter.core import beam_search
from vllm_redrafter.core.beam_search import SHARPNESS, Beams, BeamSearch, BeamShape, Candidates
from vllm_redrafter.core.drafter import Embed, ReDrafter
from vllm_redrafter.core.noise import Truncation

logger = init_logger(f"vllm.{__name__}")

Found = TypeVar("Found")

SEVERAL = 4
"""Requests that stand for all batches of more than one, where something is timed."""

_MOST_TOGETHER = 16
"""Requests up to which a compiled search may be faster: with more, it is the products that take the time."""

_WHILE_SERVING: Literal["eager_on_recompile", "fail_on_recompile"] = "eager_on_recompile"
"""What torch.compile does with a search that it has no code for: compiling it now would hold up all requests."""


class _OneRow(NamedTuple):
    """How one beam of one request is searched where the products of one row are compiled."""

    drafter: ReDrafter
    saved_seconds: float
    """Per search."""


class Searcher:
    """A copy of the drafter, and how it is searched.

    Args:
        dtype: what the drafter computes in.
        num_candidates: kept per depth; with one beam, 1 makes a chain, and more a tree along one path.
    """

    def __init__(
        self, drafter: ReDrafter, dtype: torch.dtype, embed: Embed, shape: BeamShape, num_candidates: int
    ) -> None:
        self.drafter = drafter
        self.shape = shape
        self.dtype = dtype
        self._embed = embed
        self._num_candidates = num_candidates
        self._unpacked = self
        self._search = BeamSearch(drafter, embed, shape, num_candidates, SHARPNESS)
        self._programs: dict[_Case, _Program] = {}
        self._no_noise = torch.zeros(0)  # [most requests of a program, depths, head_size]

    def __str__(self) -> str:
        how = "compiled" if self._programs else "uncompiled"
        tensors = itertools.chain(self.drafter.parameters(), self.drafter.buffers())
        num_bytes = min((each.itemsize for each in tensors if each.ndim == 2), default=self.dtype.itemsize)
        if any(isinstance(module, PackedLinear) for module in self.drafter.modules()):
            how = f"packed, {how}"
        if any(not case.several for case in self._programs) and self._one_row is not None:
            how = "one row in 16, compiled"
        return f"{self.shape.width} x {self.shape.length} tokens, weights in {8 * num_bytes} bits, {how}"

    @torch.inference_mode()
    def search(
        self,
        hidden: torch.Tensor,  # [batch, input_size]
        init_ids: torch.Tensor,  # [batch]
        floor: float,
        foresight: KnownDraws | None = None,
    ) -> Candidates:
        """Return the best continuations, looking no deeper once all have a cumulative log-probability below `floor`.

        A compiled search looks after half of the depths only.
        """
        hidden = hidden.to(self.dtype)
        num_requests = len(init_ids)
        program = None
        if self._programs and num_requests <= _MOST_TOGETHER:
            program = self._programs.get(_Case(num_requests > 1, foresight is not None and foresight.leaves_tokens_out))
        if program is None:
            return self._search.run(hidden, init_ids, floor, foresight)
        if foresight is None:
            return program(hidden, init_ids, self._no_noise[:num_requests], None, floor)
        return program(hidden, init_ids, *foresight.of_batch(num_requests), floor)

    def compile(self, num_requests: int, *, truncates: bool = False) -> None:
        """Search with a program of torch.compile for one request, or for several, if there is one and it is faster.

        Args:
            truncates: for batches in which a request draws from some tokens only; else for all others.
        """
        case = _Case(num_requests > 1, truncates)
        eager_seconds = self.seconds(num_requests, truncates=truncates)
        most = max(len(self._no_noise), _MOST_TOGETHER if case.several else 1)
        with torch.inference_mode():  # what is searched with while serving must be no other kind of tensor
            self._no_noise = torch.zeros(most, self.shape.length, self.drafter.config.head_size)
        search = self._search
        if not case.several and self._one_row is not None:
            search = BeamSearch(self._one_row.drafter, self._embed, self.shape, self._num_candidates, SHARPNESS)
        self._programs[case] = _Program(search, self.shape.length, is_dynamic=case.several)
        try:
            is_faster = self.seconds(num_requests, truncates=truncates) < eager_seconds
        except RuntimeError as error:  # torch's compilers raise many kinds of it
            is_faster = False
            logger.warning(
                "Drafts are searched for uncompiled, which takes longer: torch.compile says %r", _first_line(error)
            )
        if not is_faster:
            del self._programs[case]

    def is_compiled(self, num_requests: int) -> bool:
        """Return whether `compile` has found a program for greedy requests, one or several."""
        return _Case(num_requests > 1, truncates=False) in self._programs

    @torch.inference_mode()  # as while serving: code for other tensors would not be used there
    def seconds(self, num_requests: int, *, truncates: bool = False) -> float:
        """Return the time of a search to the full depth, the drafter's weights cold.

        Args:
            truncates: whether the requests draw from some tokens only; else they are greedy.
        """
        return median_seconds(self._whole_search(num_requests, truncates=truncates))

    @torch.inference_mode()
    def seconds_beside(self, other: Searcher, num_requests: int) -> list[float]:
        """Return the least times of a search of this kind and of another one: a difference of few operations shows."""
        return least_seconds(*(each._whole_search(num_requests) for each in (self, other)))

    def _whole_search(self, num_requests: int, *, truncates: bool = False) -> Callable[[], Candidates]:
        hidden = torch.zeros(num_requests, self.drafter.config.input_size)
        init_ids = torch.zeros(num_requests, dtype=torch.int64)
        draws = self._truncated_draws(num_requests) if truncates else None
        return lambda: self.search(hidden, init_ids, -math.inf, draws)

    def _truncated_draws(self, num_requests: int) -> KnownDraws:
        """Return what stands for any draws of requests that leave tokens out."""
        return KnownDraws(
            list(range(num_requests)),
            torch.zeros(num_requests, self.shape.length, dtype=torch.int64),
            Truncation.of([SamplingParams(temperature=1.0, top_p=0.9)] * num_requests),
            self.drafter.drafted_ids(torch.device("cpu")),
        )

    @torch.inference_mode()
    def scoring_seconds(self, num_requests: int) -> float:
        """Return the time of the products of all depths; the drafter's weights are cold at the first one."""
        hidden = torch.zeros(num_requests * self.shape.width, self.drafter.config.input_size, dtype=self.dtype)
        state = self.drafter.start(hidden)
        return median_seconds(lambda: [self.drafter.logits(state) for _ in range(self.shape.length)])

    def packed(self, num_requests: int) -> Searcher:
        """Return a search whose products read packed matrices if they are quicker; else this one.

        Raises:
            NotCompiledError: there is no C++ compiler, or it fails.
        """
        if self._packed_drafter is None:
            return self
        other = Searcher(self._packed_drafter, self.dtype, self._embed, self.shape, self._num_candidates)
        other._unpacked = self
        return other if other.scoring_seconds(num_requests) < self.scoring_seconds(num_requests) else self

    def products_seconds(self, num_requests: int, *, will_compile: bool) -> float:
        """Return the time of all products, those of one row as fast as `compile` will make them."""
        return self.scoring_seconds(num_requests) - self._saved_seconds(num_requests, will_compile)

    def one_beam(self, num_requests: int) -> Searcher:
        """Return a search with one beam."""
        # one row has loops of its own
        drafter = self._unpacked.drafter if num_requests == 1 else self.drafter
        return Searcher(drafter, self.dtype, self._embed, self.shape._replace(width=1), self._num_candidates)

    def narrowed(self, num_requests: int, most_seconds: float, *, will_compile: bool = False) -> Searcher:
        """Return a search with one beam if all of them take more than so much longer; else this one.

        Both are timed uncompiled, but it counts what `compile` will save on products of one row alone.
        """
        narrow = self.one_beam(num_requests)
        seconds, narrow_seconds = self.seconds_beside(narrow, num_requests)
        narrow_seconds -= narrow._saved_seconds(num_requests, will_compile)
        return narrow if seconds > narrow_seconds + most_seconds else self

    def _saved_seconds(self, num_requests: int, will_compile: bool) -> float:
        """Return what `compile` saves of a search by products of one row of its own."""
        if not will_compile or num_requests > 1 or self._one_row is None:
            return 0.0
        return self._one_row.saved_seconds

    @functools.cached_property
    def _packed_drafter(self) -> ReDrafter | None:
        return packed_drafter.packed(self.drafter)

    @functools.cached_property
    def _one_row(self) -> _OneRow | None:
        """How one request is searched for in the place of `_search`; None where that is not faster."""
        drafter = one_row.for_one_row(self.drafter) if self.shape.width == 1 else None
        if drafter is None:
            return None
        hidden = torch.zeros(1, 1, self.drafter.config.input_size, dtype=self.dtype)
        score = _compiled(drafter.logits)
        try:
            with torch.inference_mode():
                state = drafter.start(hidden)
                seconds = median_seconds(lambda: [score(state) for _ in range(self.shape.length)])
        except RuntimeError as error:
            logger.warning("The drafter's products are not compiled: torch.compile says %r", _first_line(error))
            return None
        saved_seconds = self.scoring_seconds(1) - seconds
        return _OneRow(drafter, saved_seconds) if saved_seconds > 0 else None


class _Case(NamedTuple):
    """What a program is for."""

    several: bool
    """More than one request."""
    truncates: bool
    """Whether some of them draw from some tokens only."""


class _Program:
    """A search as two compiled functions, one for each half of its depths; it may end between them.

    A search is some twenty small operations per depth: called one by one, they take longer than what they compute.

    Args:
        is_dynamic: whether it is for any number of requests from 2 on, and not for one.
    """

    def __init__(self, search: BeamSearch, length: int, *, is_dynamic: bool) -> None:
        half = (length + 1) // 2
        self._is_new = True
        self._is_dynamic = is_dynamic

        def first(
            hidden: torch.Tensor, init_ids: torch.Tensor, noise: torch.Tensor, truncation: Truncation | None
        ) -> tuple[Candidates, Beams]:
            return _extended(search, search.start(hidden, init_ids), noise, truncation, half)

        def rest(beams: Beams, noise: torch.Tensor, truncation: Truncation | None) -> tuple[Candidates, Beams]:
            return _extended(search, beams, noise, truncation, length - half)

        self._first = _compiled(first)
        self._rest = _compiled(rest) if length > half else None

    def __call__(
        self,
        hidden: torch.Tensor,  # [batch, input_size]
        init_ids: torch.Tensor,  # [batch]
        noise: torch.Tensor,  # [batch, depths, head_size]
        truncation: Truncation | None,
        floor: float,
    ) -> Candidates:
        """Return the best continuations, those of half of the depths if none of these is above `floor`.

        The first call compiles, and must not have a floor; all others leave tokens out where it did.
        """
        with torch.compiler.set_stance("default" if self._is_new else _WHILE_SERVING):
            self._mark(hidden, init_ids, noise, *(truncation or ())[:4])
            candidates, beams = self._first(hidden, init_ids, noise, truncation)
            if self._rest is not None and float(beams.scores[:, 0].max()) > floor:
                self._mark(*beams.state, beams.token_ids, beams.scores)
                more, _ = self._rest(beams, noise, truncation)
                candidates = beam_search.join([candidates, more])
        self._is_new = False
        return candidates

    def _mark(self, *tensors: torch.Tensor) -> None:
        """Let what is about to be compiled serve any number of requests."""
        if self._is_new and self._is_dynamic:
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0, min=2, max=_MOST_TOGETHER)


def _extended(
    search: BeamSearch,
    beams: Beams,
    noise: torch.Tensor,  # [batch, depths, head_size]
    truncation: Truncation | None,
    num_depths: int,
) -> tuple[Candidates, Beams]:
    def lifted(depth: int, logits: torch.Tensor) -> torch.Tensor:
        assert truncation is not None
        return truncation.lift(logits, noise[:, depth, None])

    depths = []
    for _ in range(num_depths):
        if truncation is None:
            candidates, beams = search.extend(beams, noise=lambda depth: noise[:, depth])
        else:
            candidates, beams = search.extend(beams, lifted)
        depths.append(candidates)
    return beam_search.join(depths), beams


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().partition("\n")[0]


def _compiled(function: Callable[..., Found]) -> Callable[..., Found]:
    # a wrapper in Python would be half of what is to be saved; without isolation, all engines that a process has had
    # share one limit of recompilations (torch's type stubs do not know of it)
    how: dict[str, Any] = {"options": {"cpp_wrapper": True}, "isolate_recompiles": True}
    compiled: Callable[..., Found] = torch.compile(function, fullgraph=True, **how)
    return compiled
