"""Times of what is small beside a step, as a step finds it: with cold caches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

NUM_TIMED = 7

_EVICTED_BYTES = 1 << 26
"""What is read before something is timed: a step reads the target's weights, and leaves all others cold."""


def least_seconds(*functions: Callable[[], object]) -> list[float]:
    """Return the least time of each of `NUM_TIMED` calls, after one of each that may have to compile something.

    They take turns, so that what else the machine does falls on all of them.
    """
    others = torch.ones(_EVICTED_BYTES // 4)
    seconds = [math.inf] * len(functions)
    for turn in range(1 + NUM_TIMED):
        for index, function in enumerate(functions):
            others.sum()
            started = time.perf_counter()
            function()
            if turn > 0:
                seconds[index] = min(seconds[index], time.perf_counter() - started)
    return seconds
