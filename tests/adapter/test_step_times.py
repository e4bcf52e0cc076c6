from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_redrafter.adapter import step_times


class StubRunner:
    """A model runner whose passes take what a table says, on a clock of its own."""

    def __init__(self, seconds: Any, max_num_tokens: int = 1000) -> None:
        self.seconds, self.max_num_tokens = seconds, max_num_tokens
        self.now = 0.0
        self.passes: list[int] = []
        self.logit_rows: list[int] = []
        self.model = SimpleNamespace(compute_logits=self._compute_logits)

    def _dummy_run(self, num_rows: int) -> tuple[torch.Tensor, None]:
        self.now += self.seconds(num_rows, self.passes.count(num_rows))
        self.passes.append(num_rows)
        # vLLM pads passes
        return torch.zeros(num_rows + 3, 2), None

    def _compute_logits(self, hidden_states: torch.Tensor) -> None:
        self.logit_rows.append(len(hidden_states))


def measure(
    monkeypatch: pytest.MonkeyPatch, runner: StubRunner, most_rows: int, decide: Callable[[bool], bool] = bool
) -> Any:
    monkeypatch.setattr(step_times, "time", SimpleNamespace(perf_counter=lambda: runner.now))
    return step_times.measure(runner, most_rows, decide)


def test_a_pass_is_timed_with_its_head_and_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = StubRunner(lambda rows, repeat: 1e-3 * rows)

    times = measure(monkeypatch, runner, 4)

    assert times.rows.tolist() == [1, 2, 3, 4]
    assert times.seconds.tolist() == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])
    assert runner.passes == [1, 2, 3, 4] * 15
    assert runner.logit_rows == runner.passes, "the head is part of a pass, its padding is not"


def test_many_rows_are_timed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = StubRunner(lambda rows, repeat: 1e-6 * rows)

    measure(monkeypatch, runner, 24)

    assert {rows: runner.passes.count(rows) for rows in (1, 12, 16, 20, 24)} == {1: 15, 12: 15, 16: 15, 20: 5, 24: 5}


@pytest.mark.parametrize("seed", range(20))
def test_what_a_row_more_costs_is_found_on_a_machine_whose_pace_changes(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    runner = StubRunner(None)

    def seconds(rows: int, repeat: int) -> float:
        # half of the time a third slower, for 150 ms or so; passes are 4% early or late, and some interrupted
        pace = 1.0 if math.sin(runner.now / 0.05) > 0 else 1.3
        return float((9e-3 + 0.5e-3 * rows) * pace * rng.normal(1.0, 0.04) + (rng.random() < 0.05) * 5e-3)

    runner.seconds = seconds
    times = measure(monkeypatch, runner, 9)

    assert times.seconds[[4, 8]] / times.seconds[0] == pytest.approx([11.5 / 9.5, 13.5 / 9.5], abs=0.1)


@pytest.mark.parametrize(
    ("most_rows", "max_num_tokens", "largest"), [(9, 1000, 9), (13, 1000, 12), (1000, 45, 32), (9999, 9999, 256)]
)
def test_no_pass_is_larger_than_what_may_come(
    monkeypatch: pytest.MonkeyPatch, most_rows: int, max_num_tokens: int, largest: int
) -> None:
    runner = StubRunner(lambda rows, repeat: 1e-6, max_num_tokens)

    assert measure(monkeypatch, runner, most_rows).rows[-1] == largest


def test_a_disturbed_moment_makes_no_size_look_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    # everything after the pass of one row took ten times as long in the first round
    runner = StubRunner(lambda rows, repeat: 1e-3 * rows * (10 if repeat == 0 and rows > 1 else 1))

    assert measure(monkeypatch, runner, 4).seconds.tolist() == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])


def test_a_pass_of_fewer_rows_is_never_said_to_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed = {1: 1.0, 2: 9.0, 3: 2.0, 4: 4.0, 5: 3.0}
    runner = StubRunner(lambda rows, repeat: 1e-3 * disturbed[rows])

    times = measure(monkeypatch, runner, 5)

    assert times.seconds.tolist() == pytest.approx([1e-3, 4.5e-3, 4.5e-3, 4.5e-3, 4.5e-3])
    assert (np.diff(times.seconds) >= 0).all()


def test_slow_models_are_not_measured_for_longer_than_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = StubRunner(lambda rows, repeat: 1.0 * rows)

    times = measure(monkeypatch, runner, 64)

    assert times.rows.tolist() == [1, 2, 3, 4, 5]  # after 10 seconds the fifth is under way
    assert times.at(np.array([6.0])).tolist() == pytest.approx([6.0])


def test_ranks_whose_clocks_differ_take_the_same_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = StubRunner(lambda rows, repeat: 1.0 * rows), StubRunner(lambda rows, repeat: 0.1 * rows)
    decisions: list[bool] = []

    def tell(own: bool) -> bool:
        decisions.append(own)
        return own

    measure(monkeypatch, first, 64, tell)
    measure(monkeypatch, second, 64, lambda own: decisions.pop(0))

    assert second.passes == first.passes
    assert decisions == []


def test_the_table_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(step_times.logger, "info", lambda message, *args: messages.append(message % args))

    measure(monkeypatch, StubRunner(lambda rows, repeat: 1e-3 * rows), 3)

    assert messages == ["Forward passes measured, rows: milliseconds: 1: 1.0, 2: 2.0, 3: 3.0"]
