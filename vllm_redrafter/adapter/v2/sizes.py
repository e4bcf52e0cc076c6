"""How large trees are under model runner V2: as large as yields the most tokens per second at the present load.

A CUDA graph holds trees of one size, so all requests of a step have trees of the same size, and of few sizes: none, a
quarter, half or all of the most nodes that are verified. A step of `b` requests with trees of `k` nodes yields

    b (1 + accepted(k)) / seconds(b, k)

tokens per second. What is accepted hardly depends on the load and is averaged over all steps; what a step takes is the
median of the last ones with about as many requests. Both are seen by the scheduler, which waits for nothing more than
it does anyway. Sizes next to the best one, and none, are tried again now and then: the less they were worth, the
later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

_FREE_ROWS = 256
"""Rows that a pass is guessed to take at about the price of one, until steps were timed: a GPU multiplies some 200 to
300 numbers in 16 bits in the time in which it reads one."""
_LEVELS_PER_DOUBLING = 4
"""Batches that differ by less than a fifth are of one load."""
_WINDOW = 9  # steps that a median is taken over
_ENOUGH_STEPS = 6  # timed before another size may follow
_ENOUGH_TREES = 128  # of a size, by which its acceptance is known to some 4%; for a trial half of them are new
_LONGEST_RUN = 192  # steps after which another size may follow though too few were timed, because prompts came between
_RECENT_TREES = 4096  # that acceptance is averaged over
_LEAST_GAIN = 1.02  # tokens per second of drafts over those without: less is noise, and drafts have a price besides
_TRIAL_SHARE = 1 / 300  # of the time, which trials of one size may cost
_LEAST_WAIT = 128  # steps until a size is tried again however close it came


def graph_sizes(num_nodes: int, max_num_seqs: int) -> list[tuple[int, int, int]]:
    """Return the sizes of trees that an engine chooses among, as vLLM's `num_speculative_tokens_per_batch_size`.

    vLLM captures CUDA graphs of every size in it, for batches up to the last one that it names for that size.

    Args:
        num_nodes: the most of a tree.
        max_num_seqs: the most requests of a batch; of fewer than four, not all sizes find a place.
    """
    sizes = sorted({num_nodes, num_nodes // 2, num_nodes // 4}, reverse=True)
    sizes = [size for size in sizes if size][: max(1, max_num_seqs - 1)]
    if max_num_seqs > 1:
        sizes.append(0)
    ranges: list[tuple[int, int, int]] = []
    first = 1
    for index, size in enumerate(sizes):
        # every size behind this one is left a batch
        most = max_num_seqs - (len(sizes) - 1 - index)
        last = min(max(first, _FREE_ROWS // (1 + size)), most) if size else most
        ranges.append((first, last, size))
        first = last + 1
    return ranges


class _Load:
    """What is known of batches of about one size."""

    def __init__(self, size: int) -> None:
        self.size = size
        """Of the trees that are drafted now."""
        self.seconds: dict[int, deque[float]] = {}
        """What the last steps took, by size of the trees verified."""
        self.clock = 0.0
        """Seconds of all steps timed."""
        self.due: dict[int, float] = {}
        """When a size may be tried again; one that is not there was never tried."""
        self.num_steps = 0
        """Chosen since the size was last up for choice."""
        self.num_timed = 0
        """Of them, so many as have been timed with trees of that size."""

    def step_seconds(self, size: int) -> float:
        """Return what a step takes with trees of a size that was timed."""
        return median(self.seconds[size])

    def as_start(self) -> _Load:
        """Return a record for another load that begins with what this one knows."""
        load = _Load(self.size)
        load.seconds = {size: deque(seconds, _WINDOW) for size, seconds in self.seconds.items()}
        load.due = {size: when - self.clock for size, when in self.due.items()}
        return load


class TreeSizes:
    """A table of the size of trees by that of the batch that learns from the steps it has led to.

    vLLM's scheduler looks up in it what it otherwise takes from `num_speculative_tokens_per_batch_size`.

    Args:
        sizes: that may be chosen: those that CUDA graphs were captured for.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sorted(set(sizes))
        self._loads: dict[int, _Load] = {}
        self._accepted = dict.fromkeys(self._sizes, 0.0)  # tokens per tree, averaged
        self._num_trees = dict.fromkeys(self._sizes, 0)

    def __getitem__(self, batch_size: int) -> int:
        """Return how many nodes are drafted for every request of a batch; counts the step."""
        load = self._load(batch_size)
        if load.num_steps >= _LONGEST_RUN or self._is_known(load):
            self._choose(load)
            load.num_steps = load.num_timed = 0
        load.num_steps += 1
        return load.size

    def observe_trees(self, size: int, num_trees: int, num_accepted: int) -> None:
        """Learn from a step's trees of one size how many of their nodes were accepted in all."""
        if num_trees and size in self._accepted:
            self._num_trees[size] += num_trees
            weight = num_trees / min(self._num_trees[size], _RECENT_TREES)
            self._accepted[size] += min(weight, 1.0) * (num_accepted / num_trees - self._accepted[size])

    def observe_step(self, batch_size: int, size: int, seconds: float) -> None:
        """Learn what a step of decoding took that verified trees of one size, and drafted such before."""
        if size not in self._accepted:
            # not one that was chosen: the first step behind a prompt, or trees that the scheduler had to cut
            return
        load = self._load(batch_size)
        load.clock += seconds
        load.seconds.setdefault(size, deque(maxlen=_WINDOW)).append(seconds)
        load.num_timed += size == load.size

    def _load(self, batch_size: int) -> _Load:
        level = round(_LEVELS_PER_DOUBLING * math.log2(batch_size))
        if level not in self._loads:
            near = [other for other in self._loads if abs(other - level) <= _LEVELS_PER_DOUBLING]
            if near:
                self._loads[level] = self._loads[min(near, key=lambda other: abs(other - level))].as_start()
            else:
                fitting = [size for size in self._sizes if batch_size * (1 + size) <= _FREE_ROWS]
                self._loads[level] = _Load(max(fitting, default=self._sizes[0]))
        return self._loads[level]

    def _is_known(self, load: _Load) -> bool:
        """Return whether enough was seen of the trees that are drafted now."""
        return load.num_timed >= _ENOUGH_STEPS and (not load.size or self._num_trees[load.size] >= _ENOUGH_TREES)

    def _choose(self, load: _Load) -> None:
        """Go on with the best size, or try one next to it."""
        if not load.seconds:
            return
        speeds = {size: self._speed(load, size) for size in load.seconds}
        best = max(speeds, key=speeds.__getitem__)
        if load.size != best:
            lost = 1 - speeds.get(load.size, 0.0) / speeds[best]
            lost_steps = max(load.num_steps * lost / _TRIAL_SHARE, _LEAST_WAIT)
            load.due[load.size] = load.clock + lost_steps * load.step_seconds(best)
        place = self._sizes.index(best)
        candidates = {self._sizes[0], *self._sizes[max(place - 1, 0) : place + 2]} - {best}
        never = -math.inf
        due = [size for size in candidates if load.due.get(size, never) <= load.clock]
        load.size = min(due, key=lambda size: (load.due.get(size, never), size), default=best)
        if load.size != best:
            # texts may have changed since it was known
            self._num_trees[load.size] = min(self._num_trees[load.size], _ENOUGH_TREES // 2)

    def _speed(self, load: _Load, size: int) -> float:
        """Return tokens per second and request, those that drafts have to bring on top left out."""
        gain = (1 + self._accepted[size]) / _LEAST_GAIN if size else 1.0
        return gain / load.step_seconds(size)
