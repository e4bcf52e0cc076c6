"""Times of what is small beside a step, as a step finds it: with cold caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

NUM_TIMED = 7

_EVICTED_BYTES = 1 << 26
"""What is read before something is timed: a step reads the target's weights, and leaves all others cold."""


def median_seconds(function: Callable[[], object]) -> float:
    """Return the median time of `NUM_TIMED` calls, after one that may have to compile something."""
    return statistics.median(_seconds_in_turn(function)[0])


def least_seconds(*functions: Callable[[], object]) -> list[float]:
    """Return the least time of each of `NUM_TIMED` calls, after one of each.

    They take turns, so that what else the machine does falls on all of them.
    """
    return [min(seconds) for seconds in _seconds_in_turn(*functions)]


def _seconds_in_turn(*functions: Callable[[], object]) -> list[list[float]]:
    others = torch.ones(_EVICTED_BYTES // 4)
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(1 + NUM_TIMED):
        for function, its_seconds in zip(functions, seconds, strict=True):
            others.sum()
            started = time.perf_counter()
            function()
            if turn > 0:
                its_seconds.append(time.perf_counter() - started)
    return seconds
