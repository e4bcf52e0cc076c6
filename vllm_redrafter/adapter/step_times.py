"""Forward passes timed at start: what a step costs by the number of its rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.logger import init_logger

from vllm_redrafter.adapter.calibration import non_decreasing
from vllm_redrafter.adapter.costs import StepTimes

logger = init_logger(f"vllm.{__name__}")

_ROWS = (*range(1, 13), 14, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
_NUM_ROUNDS = 5
_FEW_ROWS = 16
_NUM_ROUNDS_OF_FEW = 15
"""Where there are few requests, one row more or less is what a choice is about, and passes are short."""
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
    taken: dict[int, list[float]] = {}  # by rows, round by round
    for turn in range(_NUM_ROUNDS_OF_FEW):
        for count in rows if turn == 0 else list(taken):
            is_over = bool(taken) and decide(time.perf_counter() - started > _MOST_SECONDS)
            if is_over or (turn >= _NUM_ROUNDS and count > _FEW_ROWS):
                break
            taken.setdefault(count, []).append(_one_pass(runner, count))
    # the least is often a lucky one, and the median is one of a moment in which the machine was slow
    quartiles = [float(np.quantile(each, 0.25)) for each in taken.values()]
    # a pass of fewer rows never takes longer: what says so is noise
    times = StepTimes(np.array(list(taken), dtype=np.float64), np.array(non_decreasing(quartiles)))
    table = ", ".join(f"{count}: {1e3 * value:.1f}" for count, value in zip(taken, times.seconds, strict=True))
    logger.info("Forward passes measured, rows: milliseconds: %s", table)
    return times


def _one_pass(runner: Any, num_rows: int) -> float:
    started = time.perf_counter()
    hidden_states, _ = runner._dummy_run(num_rows)
    runner.model.compute_logits(hidden_states[:num_rows])
    return time.perf_counter() - started
