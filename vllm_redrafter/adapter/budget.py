"""How many nodes to verify: those that raise tokens per second at the current load, and none when none does.

A node that is accepted with probability p adds p tokens to a step and one row to the target's forward pass. With the
batch's nodes sorted by p, verifying the best k of them yields

    (requests + p_1 + ... + p_k) / time(requests + k rows)

tokens per second. The k where that is highest is the budget of the whole batch, and how it is shared among the
requests follows from the sorting. The p come from the drafter's own log-probabilities, corrected by what was accepted
so far (`Calibration`); the times come from forward passes measured at start, corrected by the steps served so far
(`Costs`). Now and then another number of nodes is verified that promises nearly as much, so that no mistake about it
lasts. Branches may cost more than their rows, so the nodes of all best paths, sorted alike, compete with those of
all trees. When even the best k hardly beats plain decoding, drafting itself stops, and is tried again now and then
(`Pauses`).

A choice is made of a few dozen numbers at every step, which is why they stand in lists: calls of numpy would take
longer than what they compute.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vllm_redrafter.adapter.calibration import Calibration
from vllm_redrafter.adapter.costs import Costs, Pace, PassRatios, StepRecord, StepTimes, median_or
from vllm_redrafter.adapter.pauses import Pauses

_TRIAL_INTERVAL = 16  # choices of which one is the least known
_TRIAL_WORTH = 0.93  # of the best one's tokens per second, which it promises at least
_CONTINUATION = 0.4  # tokens that one depth more brings, over the probability of the best beam so far
# for each request, after which drafts are verified though they are known not to pay: requests that began together then
# end apart, and their prompts come one by one, which with 8 requests of 64 tokens costs 3 to 9% of all that they take
_UNVERIFIED_STEPS = 128


class Load:
    """What is known of one level of load, of requests that are greedy or of such that are sampled.

    Args:
        level: 0 for one request, 1 for two or three, 2 for four to seven, ...
        pass_seconds: what a forward pass of that many requests takes.
        pace: the machine's.
    """

    def __init__(self, level: int, pass_seconds: float, pace: Pace) -> None:
        self.costs = Costs(pace)
        self.pauses = Pauses(level, pass_seconds)
        self.marginal_probability = 0.0
        """A node less likely than this did not pay at the last choice."""
        self.speed = 0.0
        """Tokens per second that the last choice promised."""
        self.num_choices = 0
        self.num_unverified_steps = 0
        """Steps since drafts were verified."""


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
        self._pace = Pace()
        self._loads: dict[tuple[int, bool], Load] = {}  # by level, and whether most requests are sampled
        self._pass_seconds: list[float] = []

    def load(self, batch_size: int, num_sampled: int = 0) -> Load:
        """Return the record for batches of about `batch_size` requests, most of them greedy or most of them not.

        Of the same requests greedy ones may promise twice as much as sampled ones do. Judged by one record, each kind
        would be drafted for as the other one deserves.
        """
        level = batch_size.bit_length() - 1
        key = level, 2 * num_sampled > batch_size
        if key not in self._loads:
            self._loads[key] = Load(level, self._pass_time(1 << level), self._pace)
        return self._loads[key]

    def should_draft(self, batch_size: int, num_sampled: int = 0) -> bool:
        """Return whether to draft after this step; counts the pauses."""
        load = self.load(batch_size, num_sampled)
        load.num_unverified_steps += 1
        return load.pauses.should_draft()

    def wants_plain_step(self, batch_size: int, num_sampled: int = 0) -> bool:
        """Return whether to learn from a step without drafts."""
        return self.load(batch_size, num_sampled).pauses.wants_plain_step()

    def skip_steps(self, batch_size: int, num_sampled: int = 0) -> int:
        """Return how many of the next steps there is nothing to decide about or to learn from; counts them."""
        load = self.load(batch_size, num_sampled)
        num_steps = load.pauses.skip_steps()
        load.num_unverified_steps += num_steps
        return num_steps

    def floor(self, is_greedy: Sequence[bool]) -> float:  # [batch]
        """Return the cumulative log-probability below which neither a node nor looking deeper pays."""
        batch_size = len(is_greedy)
        load = self.load(batch_size, is_greedy.count(False))
        # where the search has been ending early this underestimates what a depth costs: the next goes a little deeper
        depth_seconds = load.costs.drafting() / self._draft_length
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
        load = self.load(len(trees), is_greedy.count(False))
        costs, pauses = load.costs, load.pauses
        if pauses.is_long_over():
            costs.forget_old()
        overhead = costs.overhead()
        of_chains = self._options(chains, is_greedy, costs.chains, overhead)
        of_trees = self._options(trees, is_greedy, costs.trees, overhead)
        as_chains = max(of_chains.speeds) >= max(of_trees.speeds)
        options, ratios = (of_chains, costs.chains) if as_chains else (of_trees, costs.trees)
        best = options.best()
        load.speed, load.marginal_probability = options.speeds[best], options.marginal_probability()
        expected_tokens = load.speed * (options.forward_seconds[best] + overhead)
        late_seconds = options.forward_seconds[best] * costs.late_by() + overhead
        plain_seconds = costs.plain_step(self._pass_time(len(trees)), ratios)
        is_known = costs.are_known(best)
        promise = expected_tokens / late_seconds * plain_seconds / len(trees)
        pauses.add_promise(promise, len(trees), is_known=is_known)
        load.num_choices += 1
        chosen = options.least_known() if load.num_choices % _TRIAL_INTERVAL == 0 else best
        if is_known and not pauses.pays():
            pauses.limit(costs.drafting(), plain_seconds)
            # `best` takes the search's time as spent either way; but without drafts from now on, that time buys more.
            # Now and then they are verified all the same: what is known of such passes may be of a slow moment
            if load.num_unverified_steps < _UNVERIFIED_STEPS * len(trees):
                chosen = 0
        if chosen:
            load.num_unverified_steps = 0
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

    def observe_acceptance(self, log_probs: Iterable[float], accepted: Iterable[bool], is_greedy: bool) -> None:
        """Learn from one request's verified nodes."""
        self._calibrations[is_greedy].observe(log_probs, accepted)

    def observe_step(self, step: StepRecord) -> None:
        """Learn from a step of decoding."""
        costs = self.load(step.batch_size, step.num_sampled).costs
        costs.observe(step, self._pass_time(step.batch_size + step.num_nodes))

    def _pass_time(self, num_rows: int) -> float:
        """Return what a forward pass of so many rows took at start."""
        return self._passes(num_rows)[num_rows]

    def _passes(self, most_rows: int) -> list[float]:
        """Return what forward passes of 0, 1, 2, ... rows took at start, up to `most_rows` at least."""
        if most_rows >= len(self._pass_seconds):
            self._pass_seconds = self._times.at(np.arange(2 * most_rows, dtype=np.float64)).tolist()
        return self._pass_seconds

    def as_dict(self) -> dict[str, Any]:
        """Return, by load, what was learnt: for statistics."""
        return {
            f"<{2 << level} {'sampled' if is_sampled else 'greedy'}": {
                "gain": load.pauses.gain,
                "plain_ratio": median_or(load.costs.plain_ratio, math.nan),
                "chain_ratio": load.costs.chains.recent(),
                "tree_ratio": load.costs.trees.recent(),
                "draft_ms": 1e3 * load.costs.drafting(),
                "lateness": load.costs.late_by(),
                "other_ms": 1e3 * load.costs.other(),
                "marginal_probability": load.marginal_probability,
            }
            for (level, is_sampled), load in sorted(self._loads.items(), key=lambda item: item[0])
        }
