from __future__ import annotations

import numpy as np
import pytest

from vllm_redrafter.adapter.costs import Costs, Pace, StepRecord, StepTimes


def test_times_between_measurements_are_interpolated_and_behind_them_the_last_slope_goes_on() -> None:
    times = StepTimes(np.array([1.0, 4.0, 8.0]), np.array([2.0, 5.0, 7.0]))

    assert times.at(np.array([1.0, 2.0, 4.0, 6.0, 8.0])).tolist() == [2.0, 3.0, 5.0, 6.0, 7.0]
    assert times.at(np.array([10.0, 18.0])).tolist() == [8.0, 12.0]
    assert times.at(np.array(0.5)) == 2.0


def test_times_behind_a_falling_or_a_single_measurement_stay_where_they_are() -> None:
    assert StepTimes(np.array([1.0, 2.0]), np.array([2.0, 1.5])).at(np.array([9.0])).tolist() == [1.5]
    assert StepTimes(np.array([1.0]), np.array([2.0])).at(np.array([1.0, 9.0])).tolist() == [2.0, 2.0]


def see(costs: Costs, pace: float, num_steps: int) -> None:
    """Let steps with one node each be seen: a pass of 1, drafting of 0.2 and other things of 0.4, at this pace."""
    for _ in range(num_steps):
        costs.observe(StepRecord(1, 1, True, pace, 0.2 * pace, 1.6 * pace), expected=1.0)


@pytest.mark.parametrize("pace", [0.8, 1.0, 1.5])
def test_everything_costs_more_at_a_slower_pace_of_the_machine_though_it_was_not_seen_there(pace: float) -> None:
    shared = Pace()
    costs, others = Costs(shared), Costs(shared)
    see(costs, 1.0, num_steps=7)
    see(others, 1.0, num_steps=7)
    costs.observe(StepRecord(1, 0, False, 1.0, None, 1.1), expected=1.0)

    see(others, pace, num_steps=15)

    assert costs.drafting() == pytest.approx(0.2 * pace)
    assert costs.other() == pytest.approx(0.4 * pace)
    assert costs.overhead() == pytest.approx(0.6 * pace)
    assert costs.trees.of_all(1) == pytest.approx([pace, pace])
    assert costs.trees.recent() == pytest.approx(pace)
    assert costs.plain_step(1.0, costs.trees) == pytest.approx(1.1 * pace), "the only one that was seen"


@pytest.mark.parametrize("pace", [0.8, 1.5])
def test_what_was_seen_at_another_pace_is_remembered_as_it_is_at_the_usual_one(pace: float) -> None:
    costs = Costs(Pace())
    see(costs, 1.0, num_steps=15)
    see(costs, pace, num_steps=60)

    see(costs, 1.0, num_steps=4)

    assert costs.drafting() == pytest.approx(0.2)
    assert costs.other() == pytest.approx(0.4)
    assert costs.trees.of_all(1)[1] == pytest.approx(1.0)


def test_what_has_become_dearer_while_it_was_not_seen_tells_nothing_about_the_machines_pace() -> None:
    costs = Costs(Pace())
    chain, tree = StepRecord(1, 1, False, 1.0, 0.2, 1.6), StepRecord(1, 1, True, 1.0, 0.2, 1.6)
    larger = tree._replace(num_nodes=2)
    for step in [*[tree, larger] * 15, *[chain] * 256]:
        costs.observe(step, expected=1.0)

    for step in [tree, larger] * 3:
        costs.observe(step._replace(forward_seconds=2.0), expected=1.0)
        assert costs.chains.of_all(1)[1] == pytest.approx(1.0)

    assert costs.trees.of_all(2)[1:] == pytest.approx([2.0, 2.0])
