from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_redrafter.adapter import calibration
from vllm_redrafter.adapter.calibration import Calibration, non_decreasing

seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("truth", [lambda p: p**2, lambda p: p**0.5, lambda p: 0.6 * p], ids=["over", "under", "flat"])
def test_an_over_or_underconfident_drafter_is_seen_through(truth: object) -> None:
    rng = np.random.default_rng(0)
    calibration = Calibration()
    probed = np.log(np.array([0.05, 0.2, 0.5, 0.9]))
    assert np.allclose(calibration.probabilities(probed), np.exp(probed), rtol=0.02), "at first its word is taken"

    for _ in range(400):
        log_probs = np.log(rng.uniform(0.01, 1.0, size=100))
        calibration.observe(log_probs, rng.random(100) < truth(np.exp(log_probs)))  # type: ignore[operator]

    # bins are a quarter of a nat wide, so the curve is not met exactly
    assert np.allclose(calibration.probabilities(probed), truth(np.exp(probed)), atol=0.06)  # type: ignore[operator]


def test_rates_are_fitted_once_in_32_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    num_fits = 0

    def count(*arguments: list[float]) -> list[float]:
        nonlocal num_fits
        num_fits += 1
        return non_decreasing(*arguments)

    monkeypatch.setattr(calibration, "non_decreasing", count)
    calibrated = Calibration()
    for _ in range(64):
        calibrated.probabilities([-0.5])
        calibrated.observe([-0.5], [True])

    assert num_fits == 2
    calibrated.log_prob_of(0.5)
    assert num_fits == 3


def test_what_the_drafter_does_now_outweighs_what_it_did_long_ago() -> None:
    rng = np.random.default_rng(0)
    calibration = Calibration()
    log_probs = np.full(100, -0.75)
    for rate in (0.9, 0.1):
        for _ in range(300):
            calibration.observe(log_probs, rng.random(100) < rate)

    assert calibration.probabilities([-0.75])[0] < 0.15


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_a_more_probable_node_is_never_thought_a_worse_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    calibration = Calibration()
    for _ in range(20):
        log_probs = -rng.exponential(2.0, size=50)
        calibration.observe(log_probs, rng.random(50) < rng.random())
    rates = np.array(calibration.probabilities(np.linspace(-12.0, 0.0, 500)))

    assert (np.diff(rates) >= -1e-12).all()
    assert (rates > 0).all()
    assert (rates <= 1).all()


def test_a_drafter_that_is_always_sure_and_often_wrong_is_not_taken_at_its_word() -> None:
    calibration = Calibration()
    rng = np.random.default_rng(0)
    for _ in range(200):
        calibration.observe(np.full(8, -0.01), rng.random(8) < 0.4)

    # nodes of log-probability -0.3 were never seen: they must not lift those that were
    assert calibration.probabilities([-0.01])[0] == pytest.approx(0.4, abs=0.05)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_rates_are_the_nearest_ones_that_never_fall(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 50, size=7).astype(np.float64)
    hits = np.floor(rng.random(7) * counts)

    rates = non_decreasing(hits.tolist(), counts.tolist())

    # the definition: of the ranges around a bin, the largest by their start of the smallest means by their end
    def mean(first: int, last: int) -> float:
        return float(hits[first : last + 1].sum() / counts[first : last + 1].sum())

    expected = [max(min(mean(a, b) for b in range(i, 7)) for a in range(i + 1)) for i in range(7)]
    assert rates == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(0.0, 1.1))
def test_below_the_log_probability_of_a_rate_no_node_is_accepted_that_often(seed: int, rate: float) -> None:
    rng = np.random.default_rng(seed)
    calibration = Calibration()
    calibration.observe(-rng.exponential(2.0, size=500), rng.random(500) < 0.5)

    bound = calibration.log_prob_of(rate)

    below = np.linspace(-12.0, max(bound, -12.0), 200)
    assert bound == -math.inf or max(calibration.probabilities(below)) < rate
