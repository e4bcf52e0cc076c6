"""How many nodes to verify: those that raise tokens per second at the current load, and none when none does.

A node that is accepted with probability p adds p tokens to a step and one row to the target's forward pass. With the
batch's nodes sorted by p, verifying the best k of them yields

    (requests + p_1 + ... + p_k) / time(requests + k rows)

tokens per second. The k where that is highest is the budget of the whole batch, and how it is shared among the
requests follows from the sorting. The p come from the drafter's own log-probabilities, corrected by what was accepted
so far (`Calibration`); the times come from forward passes measured at start, corrected by the steps served so far
(`Load`). Now and then another number of nodes is verified that promises nearly as much, so that no mistake about it
lasts. Branches may cost more than their rows, so the nodes of all best paths, sorted alike, compete with those of
all trees. When even the best k hardly beats plain decoding, drafting itself stops, and is tried again now and then; a
large batch must gain more than a small one.

A choice is made of a few dozen numbers at every step, which is why they stand in lists: calls of numpy would take
longer than what they compute.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_WINDOW = 15  # measurements that a median is taken over
_PACE_WINDOW = 7  # the same for the machine's pace, which changes sooner
_ENOUGH_PASSES = 3  # passes with so many nodes after which they stand for themselves
_FIRST_PLAIN_STEP = 8  # drafted steps before the first step without drafts, which tells what plain decoding costs
_PLAIN_STEP_INTERVAL = 256  # the most drafted steps between two of them: intervals double up to that
_GAIN_WEIGHT = 0.1  # of a new promise in the moving average; less where it is of fewer requests than these
_MANY_REQUESTS = 4
_TRIAL_SEARCHES = 8  # of single requests, after which a trial decides: what is promised for one token means little
_HOPELESS = 0.7  # tokens per second, over those without drafts, at which it needs no more of them
_LEAST_GAIN = 1.03  # drafts that promise less are left: times and acceptance are known no better than that
# What a batch twice as large must promise on top: with drafts, requests that began together end apart, and the last
# ones run in small batches. Seen in closed batches of 4 and 16 requests: 5 to 8% and 8 to 10% of what steps promise.
_LEAST_GAIN_PER_DOUBLING = 0.02
_TRIAL_INTERVAL = 16  # choices of which one is the least known
_TRIAL_WORTH = 0.96  # of the best one's tokens per second, which it promises at least
_CONTINUATION = 0.4  # tokens that one depth more brings, over the probability of the best beam so far
_SEARCH_SHARE = 1 / 300  # of the time, which searches take that only tell whether drafts would pay by now
_LONGEST_PAUSE = 128  # steps without drafting before it is tried again, however dear that is
_PLAIN_STEPS_PER_LESSON = 8  # in a pause, of which one is learnt from
_COLD_SECONDS = 5e-3  # of a step: those that take less take visibly longer after steps of another kind
_COLD_STEPS = 2  # so many
_TRIALS_PER_VERIFICATION = 4  # trials of drafts that do not pay, one of which verifies them all the same


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


class Calibration:
    """How often a node is accepted, by the drafter's own cumulative log-probability of it."""

    _LOWEST = -8.0
    _BINS_PER_NAT = 4
    _LAST_BIN = 32  # that of log-probability 0
    _PRIOR = 8.0  # nodes that the drafter's own word counts for in every bin
    _MEMORY = 4000.0  # nodes after which a bin's past weighs half

    def __init__(self) -> None:
        self._centers = [self._LOWEST + index / self._BINS_PER_NAT for index in range(self._LAST_BIN + 1)]
        self._seen = [self._PRIOR] * len(self._centers)
        self._accepted = [self._PRIOR * math.exp(center) for center in self._centers]
        self._rates: list[float] | None = None  # found when asked for: a batch observes once per request

    def observe(self, log_probs: Iterable[float], accepted: Iterable[bool]) -> None:
        """Count verified nodes."""
        for log_prob, was_accepted in zip(log_probs, accepted, strict=True):
            index = round(self._place(log_prob))
            self._seen[index] += 1
            self._accepted[index] += was_accepted
            if self._seen[index] > self._MEMORY:
                self._seen[index] /= 2
                self._accepted[index] /= 2
        self._rates = None

    def probabilities(self, log_probs: Iterable[float]) -> list[float]:
        """Return how likely nodes are accepted, those left out that have a log-probability of -inf."""
        rates = self._fitted_rates()
        probabilities = []
        for log_prob in log_probs:
            if log_prob != -math.inf:
                place = self._place(log_prob)
                left = min(int(place), self._LAST_BIN - 1)
                probabilities.append(rates[left] + (place - left) * (rates[left + 1] - rates[left]))
        return probabilities

    def log_prob_of(self, probability: float) -> float:
        """Return the drafter's log-probability below which nodes are accepted less often than `probability`."""
        index = bisect.bisect_left(self._fitted_rates(), probability)
        return self._centers[index - 1] if index > 0 else -math.inf

    def _place(self, log_prob: float) -> float:
        """Return where among the bins a log-probability lies, from 0 to the last one."""
        return min(max((log_prob - self._LOWEST) * self._BINS_PER_NAT, 0.0), float(self._LAST_BIN))

    def _fitted_rates(self) -> list[float]:
        if self._rates is None:
            # a more probable node cannot be a worse one: what contradicts that is noise
            self._rates = non_decreasing(self._accepted, self._seen)
        return self._rates


class PassRatios:
    """Seconds of forward passes over those expected from the passes at start, which know of rows alone.

    They change together, as the machine's pace does, and each number of nodes has a ratio of its own at the same pace.
    What has not been seen is taken to cost as little as the passes at start say, so that it is tried.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._paces: deque[float] = deque(maxlen=_PACE_WINDOW)
        self._by_nodes: dict[int, deque[float]] = {}
        self._own: dict[int, float] = {}  # that of passes with so many nodes, at pace 1, once there were enough of them
        self.num_seen: Counter[int] = Counter()
        """Passes with so many nodes."""
        self._num_unused = 0

    def observe(self, num_nodes: int, ratio: float) -> None:
        """Learn from a pass with so many nodes."""
        self._num_unused = 0
        self.num_seen[num_nodes] += 1
        if num_nodes:
            self._recent.append(ratio)
        if num_nodes in self._own:
            self._paces.append(ratio / self._own[num_nodes])
        seen = self._by_nodes.setdefault(num_nodes, deque(maxlen=_WINDOW))
        seen.append(ratio / _median(self._paces, 1.0))
        if len(seen) >= _ENOUGH_PASSES:
            self._own[num_nodes] = median(seen)

    def count_unused(self) -> None:
        """Note a pass of the other kind; after many of them what is known of this one is out of date."""
        self._num_unused += 1
        if self._num_unused == _PLAIN_STEP_INTERVAL:
            self._recent.clear()
            self._paces.clear()
            self._by_nodes.clear()
            self._own.clear()

    def is_known(self) -> bool:
        """Return whether enough passes with nodes have been seen."""
        return len(self._recent) >= _ENOUGH_PASSES

    def recent(self) -> float:
        """Return that of the last passes with nodes, however many."""
        return _median(self._recent, 1.0)

    def of_all(self, most_nodes: int) -> list[float]:
        """Return those of passes with 0, 1, 2, ... nodes, up to `most_nodes` or what is known, if that is more."""
        pace, recent = _median(self._paces, 1.0), self.recent()
        counts = range(1 + max([most_nodes, *self._own]))
        return [pace * self._own[count] if count in self._own else recent for count in counts]


class Load:
    """What steps cost and bring at one level of load.

    Args:
        level: 0 for one request, 1 for two or three, 2 for four to seven, ...
    """

    def __init__(self, level: int) -> None:
        self.least_gain = _LEAST_GAIN + _LEAST_GAIN_PER_DOUBLING * level
        self.chains, self.trees = PassRatios(), PassRatios()
        self.draft_seconds: deque[float] = deque(maxlen=_WINDOW)
        self.other_seconds: deque[float] = deque(maxlen=_WINDOW)
        """Scheduling, sampling and messages where drafts are verified: what is neither forward pass nor drafting."""
        self.lateness: deque[float] = deque(maxlen=_WINDOW)
        """Seconds of passes over those foretold when their nodes were chosen: of many numbers of nodes whose times are
        not known exactly, the one that looks best is more often than not one that was measured too fast."""
        self.plain_ratio: deque[float] = deque(maxlen=_WINDOW)
        """Seconds of a whole step with neither drafts nor drafting over those expected of its forward pass."""
        self.gain = self.least_gain
        """Tokens per second with drafts over those without, as a moving average of what choices promised."""
        self.marginal_probability = 0.0
        """A node less likely than this did not pay at the last choice."""
        self.speed = 0.0
        """Tokens per second that the last choice promised."""
        self.num_choices = 0
        self.num_drafted = 0
        self.next_plain_step = _FIRST_PLAIN_STEP
        """Drafted steps after which the next one without drafts is due."""
        self.pause = 0
        """Steps left without drafting."""
        self.next_pause = 1
        self.num_failures = 0
        """Choices that were known not to pay."""
        self.trial_promises: list[float] | None = None
        """Those of the choices since a pause, which decide alone whether to draft on; None once they have."""
        self.num_searches = 1
        """Of the last trial."""

    def add_promise(self, promise: float, batch_size: int, *, is_known: bool) -> None:
        """Let a choice's tokens per second with drafts, over those without, count towards `gain`.

        Args:
            is_known: whether the costs behind it are; until then every promise counts alone.
        """
        if self.trial_promises is not None:
            self.trial_promises.append(promise)
            self.gain = sum(self.trial_promises) / len(self.trial_promises)
            is_over = len(self.trial_promises) * batch_size >= _TRIAL_SEARCHES or self.gain < _HOPELESS
            if is_over or not is_known:
                self.num_searches, self.trial_promises = len(self.trial_promises), None
            return
        weight = _GAIN_WEIGHT * min(1.0, batch_size / _MANY_REQUESTS)
        self.gain += (weight if is_known else 1.0) * (promise - self.gain)

    def pays(self) -> bool:
        """Return whether to go on drafting, as far as is known."""
        return self.gain >= self.least_gain or self.trial_promises is not None

    def knows_costs(self, num_nodes: int) -> bool:
        """Return whether enough steps have drafted, and verified if so many nodes look best, to believe a promise."""
        return len(self.draft_seconds) >= _ENOUGH_PASSES and (
            num_nodes == 0 or len(self.other_seconds) >= _ENOUGH_PASSES
        )

    def limit_pause(self, plain_seconds: float) -> None:
        """Let the next trial come the sooner, the less a search takes.

        Args:
            plain_seconds: of a step without drafts.
        """
        longest = self.num_searches * _median(self.draft_seconds, 0.0) / (_SEARCH_SHARE * plain_seconds)
        self.next_pause = max(1, min(self.next_pause, int(longest)))


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


class Choice(NamedTuple):
    """What is verified next."""

    num_nodes: list[int]  # [batch]
    as_chains: bool
    """Whether they are the first nodes of every request's best path; else the best ones of its tree."""
    forward_seconds: float = 0.0
    """What the pass that verifies them is reckoned to take."""


class _Options(NamedTuple):
    """What can be had of nodes of one kind: the likeliest one, two, ..., or none."""

    owners: list[int]  # [nodes], the requests whose they are, the likeliest node's first
    chances: list[float]  # [nodes], descending
    forward_seconds: list[float]  # [1 + nodes], by how many are verified
    speeds: list[float]  # [1 + nodes], tokens per second
    hopes: list[float]  # [1 + nodes], the same if the passes at start were right about them
    num_seen: Counter[int]

    def best(self) -> int:
        """Return how many yield the most tokens per second."""
        return self.speeds.index(max(self.speeds))

    def least_known(self) -> int:
        """Return how many were verified the fewest times, of those that promise nearly as much or did at start."""
        least = _TRIAL_WORTH * max(self.speeds)
        promises = enumerate(map(max, self.speeds, self.hopes))
        return min(
            (count for count, promise in promises if promise >= least),
            key=lambda count: (self.num_seen[count], -self.speeds[count]),
        )

    def marginal_probability(self) -> float:
        """Return below which probability a node does not pay."""
        best = self.best()
        seconds = self.forward_seconds[max(best - 1, 0) : best + 2]
        dearest = max((after - before for before, after in itertools.pairwise(seconds)), default=0.0)
        # where times jump behind the last node, the ones before it have paid all the same
        return min(self.speeds[best] * dearest, self.chances[best - 1] if best > 0 else math.inf)


class Budget:
    """Chooses budgets and learns from what they cost and brought; one per model runner."""

    def __init__(self, times: StepTimes, max_nodes: int, draft_length: int = 1) -> None:
        self._times = times
        self._max_nodes = max_nodes
        self._draft_length = draft_length
        self._calibrations = {True: Calibration(), False: Calibration()}  # by whether the request is greedy
        self._loads: dict[int, Load] = {}
        self._pass_seconds: list[float] = []

    def load(self, batch_size: int) -> Load:
        """Return the record for batches of about `batch_size` requests."""
        level = batch_size.bit_length() - 1
        if level not in self._loads:
            self._loads[level] = Load(level)
        return self._loads[level]

    def should_draft(self, batch_size: int) -> bool:
        """Return whether to draft after this step; counts the pauses."""
        load = self.load(batch_size)
        if load.pause > 0:
            load.pause -= 1
            return False
        if not load.pays():
            load.pause = load.next_pause
            load.next_pause = min(2 * load.next_pause, _LONGEST_PAUSE)
            load.gain, load.trial_promises = load.least_gain, []
            return False
        load.num_drafted += 1
        if load.num_drafted == load.next_plain_step:
            load.next_plain_step += min(load.num_drafted, _PLAIN_STEP_INTERVAL)
            # two in a row: the step between them has neither drafts nor drafting
            load.pause = 1 if self._passes(batch_size)[batch_size] > _COLD_SECONDS else 1 + _COLD_STEPS
            return False
        return True

    def wants_plain_step(self, batch_size: int) -> bool:
        """Return whether to learn from a step without drafts: from the last one of a pause, and one in eight before."""
        return self.load(batch_size).pause % _PLAIN_STEPS_PER_LESSON == 0

    def floor(self, is_greedy: Sequence[bool]) -> float:  # [batch]
        """Return the cumulative log-probability below which neither a node nor looking deeper pays."""
        batch_size = len(is_greedy)
        load = self.load(batch_size)
        # where the search has been ending early this underestimates what a depth costs: the next goes a little deeper
        depth_seconds = _median(load.draft_seconds, 0.0) / self._draft_length
        worth_a_depth = load.speed * depth_seconds / batch_size / _CONTINUATION
        # what pays may change until the next choice, so a node is given the benefit of the doubt
        probability = max(load.marginal_probability / 2, worth_a_depth)
        return min(self._calibrations[greedy].log_prob_of(probability) for greedy in set(is_greedy))

    def choose(
        self, trees: Sequence[Sequence[float]], chains: Sequence[Sequence[float]], is_greedy: Sequence[bool]
    ) -> Choice:
        """Return how many nodes to verify of every request.

        Args:
            trees: [batch, candidates], cumulative log-probabilities, descending in every row; -inf where there is none.
            chains: [batch, depths], those on every request's best path.
            is_greedy: by request.
        """
        load = self.load(len(trees))
        overhead = _median(load.other_seconds, 0.0) + _median(load.draft_seconds, 0.0)
        of_chains = self._options(chains, is_greedy, load.chains, overhead)
        of_trees = self._options(trees, is_greedy, load.trees, overhead)
        as_chains = max(of_chains.speeds) >= max(of_trees.speeds)
        options, ratios = (of_chains, load.chains) if as_chains else (of_trees, load.trees)
        best = options.best()
        load.speed, load.marginal_probability = options.speeds[best], options.marginal_probability()
        expected_tokens = load.speed * (options.forward_seconds[best] + overhead)
        late_seconds = options.forward_seconds[best] * _median(load.lateness, 1.0) + overhead
        plain_seconds = self._plain_seconds(load, len(trees), ratios)
        promise = expected_tokens / late_seconds * plain_seconds / len(trees)
        is_known = load.knows_costs(best)
        load.add_promise(promise, len(trees), is_known=is_known)
        load.num_choices += 1
        chosen = options.least_known() if load.num_choices % _TRIAL_INTERVAL == 0 else best
        if load.trial_promises is None and load.pays():
            load.next_pause = 1
        elif is_known and not load.pays():
            load.limit_pause(plain_seconds)
            load.num_failures += 1
            # `best` takes the search's time as spent either way; but without drafts from now on, that time buys more.
            # Now and then they are verified all the same: what is known of such passes may be of a slow moment
            if load.num_failures % _TRIALS_PER_VERIFICATION:
                chosen = 0
        shares = Counter(options.owners[:chosen])
        return Choice([shares[request] for request in range(len(trees))], as_chains, options.forward_seconds[chosen])

    def _options(
        self, log_probs: Sequence[Sequence[float]], is_greedy: Sequence[bool], ratios: PassRatios, overhead: float
    ) -> _Options:
        """Return what can be had of nodes of one kind.

        Args:
            ratios: of the passes that verify them.
            overhead: seconds of a step beside its forward pass.
        """
        nodes: list[tuple[float, int]] = []  # how likely it is accepted, whose it is
        for request, (row, greedy) in enumerate(zip(log_probs, is_greedy, strict=True)):
            chances = self._calibrations[greedy].probabilities(row[: self._max_nodes])
            nodes += zip(chances, itertools.repeat(request))
        nodes.sort(key=lambda node: node[0], reverse=True)

        batch_size, recent = len(log_probs), ratios.recent()
        tokens = list(itertools.accumulate((chance for chance, _ in nodes), initial=float(batch_size)))
        by_nodes = ratios.of_all(len(nodes))
        most_rows = batch_size + len(by_nodes)
        passes = self._passes(most_rows)[batch_size:most_rows]
        seen = [each * ratio for each, ratio in zip(passes, by_nodes, strict=True)]
        # fewer nodes never take longer: what says so was seen in a slow moment, and would never be seen again
        seconds = list(itertools.accumulate(reversed(seen), min))[::-1][: len(tokens)]
        return _Options(
            [owner for _, owner in nodes],
            [chance for chance, _ in nodes],
            seconds,
            [expected / (each + overhead) for expected, each in zip(tokens, seconds, strict=True)],
            [expected / (each * recent + overhead) for expected, each in zip(tokens, passes, strict=False)],
            ratios.num_seen,
        )

    def _plain_seconds(self, load: Load, batch_size: int, ratios: PassRatios) -> float:
        """Return what a step of plain decoding takes.

        Args:
            ratios: what stands for those of its pass while it has not been seen.
        """
        expected = self._passes(batch_size)[batch_size]
        if len(load.plain_ratio) >= _ENOUGH_PASSES:
            return expected * median(load.plain_ratio)
        # the least of what little is known: one slow step must not let drafts look good, whereas one that was too fast
        # leads to a pause, in which more of them are seen
        unseen = expected * ratios.recent() + _median(load.other_seconds, 0.0)
        return min([unseen, *(expected * ratio for ratio in load.plain_ratio)])

    def observe_acceptance(self, log_probs: Iterable[float], accepted: Iterable[bool], is_greedy: bool) -> None:
        """Learn from one request's verified nodes."""
        self._calibrations[is_greedy].observe(log_probs, accepted)

    def observe_step(self, step: StepRecord) -> None:
        """Learn from a step of decoding."""
        load = self.load(step.batch_size)
        num_rows = step.batch_size + step.num_nodes
        expected = self._passes(num_rows)[num_rows]
        kinds = (load.trees, load.chains) if step.has_branches else (load.chains, load.trees)
        if step.num_nodes:
            kinds[1].count_unused()
            # while nothing was known of such passes, what was foretold was no more than a guess
            if step.foretold_seconds is not None and kinds[0].is_known():
                load.lateness.append(step.forward_seconds / step.foretold_seconds)
        kinds[0].observe(step.num_nodes, step.forward_seconds / expected)
        if not step.num_nodes and step.draft_seconds is None:
            load.plain_ratio.append(step.total_seconds / expected)
            return
        if step.draft_seconds is not None:
            load.draft_seconds.append(step.draft_seconds)
        # at every depth of a walk the sampler is called once more: a step with nothing to verify tells too little
        if step.num_nodes:
            other = step.total_seconds - step.forward_seconds - (step.draft_seconds or 0.0)
            load.other_seconds.append(max(other, 0.0))

    def _passes(self, most_rows: int) -> list[float]:
        """Return what forward passes of 0, 1, 2, ... rows took at start, up to `most_rows` at least."""
        if most_rows >= len(self._pass_seconds):
            self._pass_seconds = self._times.at(np.arange(2 * most_rows, dtype=np.float64)).tolist()
        return self._pass_seconds

    def as_dict(self) -> dict[str, Any]:
        """Return, by load, what was learnt: for statistics."""
        return {
            f"<{2 << level}": {
                "gain": load.gain,
                "plain_ratio": _median(load.plain_ratio, math.nan),
                "chain_ratio": load.chains.recent(),
                "tree_ratio": load.trees.recent(),
                "draft_ms": 1e3 * _median(load.draft_seconds, math.nan),
                "lateness": _median(load.lateness, math.nan),
                "other_ms": 1e3 * _median(load.other_seconds, math.nan),
                "marginal_probability": load.marginal_probability,
            }
            for level, load in sorted(self._loads.items())
        }


def non_decreasing(sums: Sequence[float], counts: Sequence[float] | None = None) -> list[float]:  # [bins] each
    """Return the means that never fall from bin to bin and fit best: neighbours that contradict are pooled.

    Args:
        counts: what each bin's sum is over; 1 if left out.
    """
    pools: list[tuple[float, float, int]] = []  # sum, count, bins
    for bin_sum, bin_count in zip(sums, [1.0] * len(sums) if counts is None else counts, strict=True):
        pool = (bin_sum, bin_count, 1)
        while pools and pools[-1][0] * pool[1] > pool[0] * pools[-1][1]:
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2] + pool[2])
        pools.append(pool)
    return [pool[0] / pool[1] for pool in pools for _ in range(pool[2])]


def _median(values: Sequence[float], default: float) -> float:
    return median(values) if values else default
