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
    others = torch.ones(_EVICTED_BYTES // 4)
    seconds = []
    for _ in range(1 + NUM_TIMED):
        others.sum()
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
