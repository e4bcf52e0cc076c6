"""What steps of decoding cost: forward passes as measured at start, corrected by the steps served since.

Everything that changes with the machine's pace is a median of the last few measurements: one slow moment moves none of
them, and what was true a hundred steps ago is soon forgotten.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ENOUGH = 3
"""Measurements from which on they are believed."""

_WINDOW = 15  # measurements that a median is taken over
_PACE_WINDOW = 7  # the same for the machine's pace, which changes sooner
_OUTDATED = 256  # passes of one kind after which what is known of the other kind is out of date


class StepTimes(NamedTuple):
    """Seconds of a forward pass by its number of rows, as measured at start."""

    rows: Floats  # [num_measured], ascending
    seconds: Floats  # [num_measured]

    def at(self, rows: Floats) -> Floats:  # any shape
        """Return the time of passes of `rows` rows, the last slope continued behind the largest one measured."""
        inside = np.interp(rows, self.rows, self.seconds)
        if len(self.rows) < 2:
            return inside
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.rows[-1] - self.rows[-2])
        beyond: Floats = inside + np.maximum(rows - self.rows[-1], 0) * max(slope, 0.0)
        return beyond

    def of(self, num_rows: int) -> float:
        """Return the time of one pass."""
        return float(self.at(np.array(float(num_rows))))


class Pace:
    """How long things take by now over what they took when they were measured first.

    A machine that others share changes its pace by a fifth within seconds. What was measured at different times can
    only be compared once that is taken out: else drafts that happened to be seen in a good moment look better than the
    plain steps of a bad one, and for as long as both are remembered.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_PACE_WINDOW)
        self.now = 1.0

    def observe(self, ratio: float) -> None:
        """Learn from what something took over what it takes at pace 1."""
        self._recent.append(ratio)
        self.now = median(self._recent)


class PassRatios:
    """Seconds of forward passes over those expected from the passes at start, which know of rows alone.

    They change together, as the machine's pace does, and each number of nodes has a ratio of its own at the same pace.
    What has not been seen is taken to cost as little as the passes at start say, so that it is tried.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._recent: deque[float] = deque(maxlen=_WINDOW)  # at pace 1
        self._by_nodes: dict[int, deque[float]] = {}
        self._own: dict[int, float] = {}  # that of passes with so many nodes, at pace 1, once there were enough of them
        # the same when there first were, which the pace is told by. Were it told by what is verified because it looked
        # quick of late, luck would pass for a slower machine, time and again: in ten thousand steps for one by half
        self._first: dict[int, float] = {}
        self.num_seen: Counter[int] = Counter()
        """Passes with so many nodes."""
        self._num_unused = 0

    def observe(self, num_nodes: int, ratio: float) -> None:
        """Learn from a pass with so many nodes."""
        self._num_unused = 0
        self.num_seen[num_nodes] += 1
        if num_nodes in self._first:
            self._pace.observe(ratio / self._first[num_nodes])
        steady = ratio / self._pace.now
        if num_nodes:
            self._recent.append(steady)
        seen = self._by_nodes.setdefault(num_nodes, deque(maxlen=_WINDOW))
        seen.append(steady)
        if len(seen) >= ENOUGH:
            self._own[num_nodes] = median(seen)
            if len(seen) < _WINDOW:
                self._first[num_nodes] = self._own[num_nodes]

    def count_unused(self) -> None:
        """Note a pass of the other kind; after many of them what is known of this one is out of date."""
        self._num_unused += 1
        if self._num_unused == _OUTDATED:
            self._recent.clear()
            self._by_nodes.clear()
            self._own.clear()
            self._first.clear()

    def is_known(self) -> bool:
        """Return whether enough passes with nodes have been seen."""
        return len(self._recent) >= ENOUGH

    def recent(self) -> float:
        """Return that of the last passes with nodes, however many."""
        return self._pace.now * median_or(self._recent, 1.0)

    def of_all(self, most_nodes: int) -> list[float]:
        """Return those of passes with 0, 1, 2, ... nodes, up to `most_nodes` or what is known, if that is more."""
        pace, recent = self._pace.now, self.recent()
        counts = range(1 + max([most_nodes, *self._own]))
        return [pace * self._own[count] if count in self._own else recent for count in counts]


class StepRecord(NamedTuple):
    """What one step of decoding took."""

    batch_size: int
    num_nodes: int
    """Nodes verified, summed over the batch."""
    has_branches: bool
    """Whether some of them are not on their request's first path."""
    forward_seconds: float
    draft_seconds: float | None
    """Drafting at its end; None where nothing was drafted."""
    total_seconds: float
    """From its start to the start of the next step."""
    foretold_seconds: float | None = None
    """Of its forward pass, when its nodes were chosen; None where none were."""
    num_sampled: int = 0
    """Requests of the batch that are not greedy."""


class Costs:
    """What steps cost at one level of load.

    Args:
        pace: the machine's, which all levels share. What is remembered is what things take at pace 1.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self.chains, self.trees = PassRatios(pace), PassRatios(pace)
        self.draft_seconds: deque[float] = deque(maxlen=_WINDOW)
        self.other_seconds: deque[float] = deque(maxlen=_WINDOW)
        """Scheduling, sampling and messages where drafts are verified: what is neither forward pass nor drafting."""
        self.lateness: deque[float] = deque(maxlen=_WINDOW)
        """Seconds of passes over those foretold when their nodes were chosen: of many numbers of nodes whose times are
        not known exactly, the one that looks best is more often than not one that was measured too fast."""
        self.plain_ratio: deque[float] = deque(maxlen=_WINDOW)
        """Seconds of a whole step with neither drafts nor drafting over those expected of its forward pass."""

    def observe(self, step: StepRecord, expected: float) -> None:
        """Learn from a step.

        Args:
            expected: seconds of its forward pass by those at start.
        """
        kinds = (self.trees, self.chains) if step.has_branches else (self.chains, self.trees)
        if step.num_nodes:
            kinds[1].count_unused()
            # while nothing was known of such passes, what was foretold was no more than a guess
            if step.foretold_seconds is not None and kinds[0].is_known():
                self.lateness.append(step.forward_seconds / step.foretold_seconds)
        kinds[0].observe(step.num_nodes, step.forward_seconds / expected)
        pace = self._pace.now
        if not step.num_nodes and step.draft_seconds is None:
            self.plain_ratio.append(step.total_seconds / expected / pace)
            return
        if step.draft_seconds is not None:
            self.draft_seconds.append(step.draft_seconds / pace)
        # at every depth of a walk the sampler is called once more: a step with nothing to verify tells too little
        if step.num_nodes:
            other = step.total_seconds - step.forward_seconds - (step.draft_seconds or 0.0)
            self.other_seconds.append(max(other, 0.0) / pace)

    def forget_old(self) -> None:
        """Keep no more of what is measured with drafts alone than is believed at least.

        Between long pauses measurements come one by one. Had they to outvote all those of a slow moment, drafts would
        stay off long after it.
        """
        for measurements in (self.draft_seconds, self.other_seconds, self.lateness):
            while len(measurements) > ENOUGH:
                measurements.popleft()

    def are_known(self, num_nodes: int) -> bool:
        """Return whether enough steps have drafted, and verified if so many nodes look best, to believe a promise."""
        return len(self.draft_seconds) >= ENOUGH and (num_nodes == 0 or len(self.other_seconds) >= ENOUGH)

    def late_by(self) -> float:
        """Return how many times longer than foretold passes take: a choice never makes one quicker."""
        return max(median_or(self.lateness, 1.0), 1.0)

    def drafting(self) -> float:
        """Return the seconds of drafting."""
        return self._pace.now * median_or(self.draft_seconds, 0.0)

    def other(self) -> float:
        """Return the seconds of a step that verifies drafts beside its forward pass and drafting."""
        return self._pace.now * median_or(self.other_seconds, 0.0)

    def overhead(self) -> float:
        """Return the seconds of a step with drafts beside its forward pass."""
        return self.other() + self.drafting()

    def plain_step(self, expected: float, ratios: PassRatios) -> float:
        """Return the seconds of a step of plain decoding.

        Args:
            expected: those of its forward pass by those at start.
            ratios: what stands for those of its pass while it has not been seen.
        """
        pace = self._pace.now
        if len(self.plain_ratio) >= ENOUGH:
            return expected * pace * median(self.plain_ratio)
        # the least of what little is known: one slow step must not let drafts look good, whereas one that was too fast
        # leads to a pause, in which more of them are seen
        unseen = expected * ratios.recent() + self.other()
        return min([unseen, *(expected * pace * ratio for ratio in self.plain_ratio)])


def median_or(values: Sequence[float], default: float) -> float:
    """Return the median, or `default` if there are no values."""
    return median(values) if values else default
