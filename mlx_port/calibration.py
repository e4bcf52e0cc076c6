"""What drafting costs and brings on this machine: the tree budget to start with, and when to give up.

How much a forward over more rows costs depends on kernels that differ from chip to chip, with steps where they take
turns; so forwards of a few sizes are timed. What a budget brings depends on drafter and text, and is not known before:
the budget is chosen for a typical drafter, and the gain is measured while the text is made.
"""

from __future__ import annotations

import math
import time
from statistics import median
from typing import NamedTuple

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream

from mlx_port import token_tree
from mlx_port.target import Target

ROWS = (1, 2, 5, 10, 15)
"""Sizes of the forwards that are timed: the last ones before MLX's kernels for few rows give way to others."""

MIN_ROUNDS = 16
"""Verifications before a gain is believed."""

_NUM_REPEATS = 5
_NUM_BASELINE_TOKENS = 16
_CONTEXT_LENGTH = 64
# tokens per step are about 1 + 0.5 log2(1 + nodes) for the drafters that we know (README, example pair)
_TOKENS_PER_DOUBLING = 0.5


class Calibration(NamedTuple):
    """What a target's forwards cost here."""

    row_seconds: dict[int, float]
    """Median seconds of a forward by its number of rows."""
    baseline_seconds: float
    """Seconds per token of mlx-lm without a drafter."""

    @property
    def tree_budget(self) -> int:
        """Nodes that promise most tokens per second, among the sizes timed; 1 where no tree pays."""
        promise = {
            rows: (1 + _TOKENS_PER_DOUBLING * math.log2(rows)) / seconds
            for rows, seconds in self.row_seconds.items()
            if rows > 1
        }
        return max(promise, key=lambda rows: promise[rows]) - 1


def calibrate(target: Target) -> Calibration:
    """Return what forwards cost here; it takes about thirty of them."""
    context = [1 + i % 7 for i in range(_CONTEXT_LENGTH)]
    row_seconds = {rows: _forward_seconds(target, context, rows) for rows in ROWS}
    steps = generate_step(mx.array(context), target.model, max_tokens=_NUM_BASELINE_TOKENS)
    # reading the context is no part of it, and the first step warms up
    next(steps)
    next(steps)
    start = time.perf_counter()
    num_tokens = sum(1 for _ in steps)
    return Calibration(row_seconds, (time.perf_counter() - start) / num_tokens)


def _forward_seconds(target: Target, context: list[int], rows: int) -> float:
    tree = token_tree.chain(context[:rows])
    seconds = []
    with mx.stream(generation_stream):
        caches = target.make_caches()
        target.model(mx.array(context)[None], cache=caches)
        mx.eval([layer.state for layer in caches])
        # the first one compiles kernels
        for _ in range(1 + _NUM_REPEATS):
            start = time.perf_counter()
            mx.eval(target.look(tree, caches).logits.argmax(axis=-1))
            seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


class Pace:
    """Compares the speed of drafting with that of mlx-lm alone, while a text is made."""

    def __init__(self, baseline_seconds: float) -> None:
        self._baseline_seconds = baseline_seconds
        self._num_rounds, self._num_tokens, self._seconds = 0, 0, 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Count a verification."""
        self._num_rounds += 1
        self._num_tokens += num_tokens
        self._seconds += seconds

    @property
    def gain(self) -> float | None:
        """Return how many times as fast drafting is, or None as long as that is not known."""
        if self._num_rounds < MIN_ROUNDS:
            return None
        return self._num_tokens * self._baseline_seconds / self._seconds
