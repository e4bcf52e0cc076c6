"""How often drafted tokens are accepted, learnt from those that were verified."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence


class Calibration:
    """How often a node is accepted, by the drafter's own cumulative log-probability of it."""

    _LOWEST = -8.0
    _BINS_PER_NAT = 4
    _LAST_BIN = 32  # that of log-probability 0
    _PRIOR = 8.0  # nodes that the drafter's own word counts for in every bin
    _MEMORY = 4000.0  # nodes after which a bin's past weighs half
    _NODES_PER_FIT = 32  # observed before rates are fitted anew

    def __init__(self) -> None:
        self._centers = [self._LOWEST + index / self._BINS_PER_NAT for index in range(self._LAST_BIN + 1)]
        self._seen = [self._PRIOR] * len(self._centers)
        self._accepted = [self._PRIOR * math.exp(center) for center in self._centers]
        self._rates: list[float] = []  # fitted when asked for: a batch observes once per request
        self._num_unfitted = self._NODES_PER_FIT

    def observe(self, log_probs: Iterable[float], accepted: Iterable[bool]) -> None:
        """Count verified nodes."""
        for log_prob, was_accepted in zip(log_probs, accepted, strict=True):
            index = round(self._place(log_prob))
            self._seen[index] += 1
            self._accepted[index] += was_accepted
            self._num_unfitted += 1
            if self._seen[index] > self._MEMORY:
                self._seen[index] /= 2
                self._accepted[index] /= 2

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
        if self._num_unfitted >= self._NODES_PER_FIT:
            self._num_unfitted = 0
            # a more probable node cannot be a worse one: what contradicts that is noise
            self._rates = non_decreasing(self._accepted, self._seen)
        return self._rates


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
