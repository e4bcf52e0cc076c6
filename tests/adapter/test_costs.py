from __future__ import annotations

import numpy as np

from vllm_redrafter.adapter.costs import StepTimes


def test_times_between_measurements_are_interpolated_and_behind_them_the_last_slope_goes_on() -> None:
    times = StepTimes(np.array([1.0, 4.0, 8.0]), np.array([2.0, 5.0, 7.0]))

    assert times.at(np.array([1.0, 2.0, 4.0, 6.0, 8.0])).tolist() == [2.0, 3.0, 5.0, 6.0, 7.0]
    assert times.at(np.array([10.0, 18.0])).tolist() == [8.0, 12.0]
    assert times.at(np.array(0.5)) == 2.0


def test_times_behind_a_falling_or_a_single_measurement_stay_where_they_are() -> None:
    assert StepTimes(np.array([1.0, 2.0]), np.array([2.0, 1.5])).at(np.array([9.0])).tolist() == [1.5]
    assert StepTimes(np.array([1.0]), np.array([2.0])).at(np.array([1.0, 9.0])).tolist() == [2.0, 2.0]
