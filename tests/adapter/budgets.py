"""Small budgets for tests: what passes take, and a choice among trees alone."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np

from vllm_redrafter.adapter.budget import Budget
from vllm_redrafter.adapter.costs import Floats, StepRecord, StepTimes

FREE = StepTimes(np.array([1.0, 256.0]), np.array([1.0, 1.0]))
"""A pass takes as long whatever its rows: every node pays."""
PER_ROW = StepTimes(np.array([1.0, 256.0]), np.array([1.0, 256.0]))
"""A row costs as much as the first one: no node that may be rejected pays."""
TYPICAL = StepTimes(np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([10.0, 10.5, 12.0, 16.0, 26.0]))


def choose(budget: Budget, log_probs: Floats, is_greedy: list[bool]) -> list[int]:
    """Return what is chosen where nothing but trees may be."""
    choice = budget.choose(log_probs.tolist(), [[-math.inf]] * len(log_probs), is_greedy)
    assert not choice.as_chains or not any(choice.num_nodes)
    return choice.num_nodes


def promised(budget: Budget, log_probs: Floats) -> float:
    """Return the tokens per second, over those without drafts, that a choice among trees promises."""
    with mock.patch.object(budget.load(len(log_probs)).pauses, "add_promise") as add_promise:
        choose(budget, log_probs, [True] * len(log_probs))
    return float(add_promise.call_args.args[0])


def plain_step(seconds: float, batch_size: int = 1) -> StepRecord:
    return StepRecord(batch_size, 0, False, seconds, None, seconds)
