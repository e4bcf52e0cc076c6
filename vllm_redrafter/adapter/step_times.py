"""Forward passes timed at start: what a step costs by the number of its rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.logger import init_logger

from vllm_redrafter.adapter.budget import StepTimes

logger = init_logger(f"vllm.{__name__}")

_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
_NUM_ROUNDS = 5
_MOST_SECONDS = 10.0
"""Larger passes are left out once this much time has gone; the last slope stands for them."""


def measure(runner: Any, most_rows: int, decide: Callable[[bool], bool]) -> StepTimes:
    """Return the times of passes of up to `most_rows` rows, the head included, attention over a context not.

    Args:
        runner: a model runner of vLLM whose model is loaded and compiled.
        decide: makes what this rank's clock says the same on all ranks: they wait for each other in every pass.
    """
    started = time.perf_counter()
    rows = [count for count in _ROWS if count <= min(most_rows, runner.max_num_tokens)]
    quickest: dict[int, float] = {}
    # round by round: what disturbs the machine for a moment then falls on all sizes, and no size on its own looks slow
    for turn in range(_NUM_ROUNDS):
        for count in rows if turn == 0 else list(quickest):
            if quickest and decide(time.perf_counter() - started > _MOST_SECONDS):
                break
            quickest[count] = min(_one_pass(runner, count), quickest.get(count, math.inf))
    seconds = list(quickest.values())
    # a pass of fewer rows never takes longer: what says so was disturbed
    monotone = np.minimum.accumulate(seconds[::-1])[::-1]
    times = StepTimes(np.array(list(quickest), dtype=np.float64), monotone)
    table = ", ".join(f"{count}: {1e3 * value:.1f}" for count, value in zip(quickest, monotone, strict=True))
    logger.info("Forward passes measured, rows: milliseconds: %s", table)
    return times


def _one_pass(runner: Any, num_rows: int) -> float:
    started = time.perf_counter()
    hidden_states, _ = runner._dummy_run(num_rows)
    runner.model.compute_logits(hidden_states[:num_rows])
    return time.perf_counter() - started
