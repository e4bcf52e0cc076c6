from __future__ import annotations

import logging

import pytest
from mlx_lm.sample_utils import make_logits_processors

from mlx_port.calibration import MIN_ROUNDS, ROWS, Calibration, Pace, calibrate
from tests.mlx_port.tiny_models import alone, drafted, make_plan, make_target


@pytest.mark.parametrize(
    ("row_seconds", "budget"),
    [
        ({1: 1.0, 2: 1.0, 5: 1.0, 10: 1.0, 15: 1.0}, 14),
        # one pass over the weights for every five rows
        ({1: 1.0, 2: 1.0, 5: 1.0, 10: 2.0, 15: 3.0}, 4),
        # every row costs as much as the first
        ({1: 1.0, 2: 2.0, 5: 5.0, 10: 10.0, 15: 15.0}, 1),
    ],
)
def test_the_budget_follows_what_rows_cost(row_seconds: dict[int, float], budget: int) -> None:
    assert Calibration(row_seconds, 1.0).tree_budget == budget


def test_a_calibration_times_all_sizes() -> None:
    calibration = calibrate(make_target())

    assert tuple(calibration.row_seconds) == ROWS
    assert all(seconds > 0 for seconds in (*calibration.row_seconds.values(), calibration.baseline_seconds))
    assert calibration.tree_budget + 1 in ROWS


def test_a_gain_is_believed_after_some_rounds() -> None:
    pace = Pace(baseline_seconds=0.5)
    for _ in range(MIN_ROUNDS - 1):
        pace.add(3, 1.0)
    assert pace.gain is None

    pace.add(3, 1.0)

    assert pace.gain == 1.5


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("processed", [False, True])
def test_drafting_that_does_not_pay_stops_and_the_text_goes_on(
    name: str, processed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    target, prompt = make_target(name), [4]
    options = {"logits_processors": make_logits_processors(repetition_penalty=1.3)} if processed else {}

    with caplog.at_level(logging.WARNING):
        token_ids, telemetry = drafted(
            target, prompt, 120, plan=make_plan(4, 3, 8), pace=Pace(baseline_seconds=0.0), **options
        )

    assert token_ids == alone(target, prompt, 120, **options)
    assert telemetry.round_count == MIN_ROUNDS
    assert telemetry.emitted_token_count == 120
    assert "drafting runs at 0.00 times the speed of mlx-lm alone: it stops" in caplog.text


def test_drafting_that_pays_goes_on() -> None:
    _, telemetry = drafted(make_target(), [4], 120, plan=make_plan(4, 3, 8), pace=Pace(baseline_seconds=1e9))

    assert telemetry.round_count > MIN_ROUNDS
