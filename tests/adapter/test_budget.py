from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_redrafter.adapter import budget as budget_module
from vllm_redrafter.adapter.budget import Budget, Calibration, Floats, StepRecord, StepTimes

FREE = StepTimes(np.array([1.0, 256.0]), np.array([1.0, 1.0]))
"""A pass takes as long whatever its rows: every node pays."""
PER_ROW = StepTimes(np.array([1.0, 256.0]), np.array([1.0, 256.0]))
"""A row costs as much as the first one: no node that may be rejected pays."""
TYPICAL = StepTimes(np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([10.0, 10.5, 12.0, 16.0, 26.0]))
seeds = st.integers(0, 2**32 - 1)


def random_log_probs(rng: np.random.Generator, batch_size: int, num_candidates: int) -> Floats:
    """Return cumulative log-probabilities, descending in every row; -inf where a row has fewer candidates."""
    log_probs = -rng.exponential(scale=rng.uniform(0.1, 1.0, size=(batch_size, 1)), size=(batch_size, num_candidates))
    log_probs = log_probs.cumsum(axis=1)
    for row, size in enumerate(rng.integers(num_candidates + 1, size=batch_size)):
        log_probs[row, size:] = -math.inf
    return log_probs


def random_times(rng: np.random.Generator) -> StepTimes:
    """Return times with jumps, as kernels that work on tiles of rows have them."""
    rows = np.sort(rng.choice(np.arange(1, 40), size=8, replace=False)).astype(np.float64)
    return StepTimes(rows, 5.0 + rng.exponential(size=8).cumsum() * rng.integers(0, 2, size=8))


def choose(budget: Budget, log_probs: Floats, is_greedy: list[bool]) -> list[int]:
    """Return what is chosen where nothing but trees may be."""
    choice = budget.choose(log_probs.tolist(), [[-math.inf]] * len(log_probs), is_greedy)
    assert not choice.as_chains or not any(choice.num_nodes)
    return choice.num_nodes


def plain_step(seconds: float, batch_size: int = 1) -> StepRecord:
    return StepRecord(batch_size, 0, False, seconds, None, seconds)


# StepTimes


def test_times_between_measurements_are_interpolated_and_behind_them_the_last_slope_goes_on() -> None:
    times = StepTimes(np.array([1.0, 4.0, 8.0]), np.array([2.0, 5.0, 7.0]))

    assert times.at(np.array([1.0, 2.0, 4.0, 6.0, 8.0])).tolist() == [2.0, 3.0, 5.0, 6.0, 7.0]
    assert times.at(np.array([10.0, 18.0])).tolist() == [8.0, 12.0]
    assert times.at(np.array(0.5)) == 2.0


def test_times_behind_a_falling_or_a_single_measurement_stay_where_they_are() -> None:
    assert StepTimes(np.array([1.0, 2.0]), np.array([2.0, 1.5])).at(np.array([9.0])).tolist() == [1.5]
    assert StepTimes(np.array([1.0]), np.array([2.0])).at(np.array([1.0, 9.0])).tolist() == [2.0, 2.0]


# Calibration


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

    rates = budget_module.non_decreasing(hits.tolist(), counts.tolist())

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


# Budget.choose


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 5))
def test_the_choice_yields_the_most_tokens_per_second_of_all_choices(seed: int, batch_size: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    times = random_times(rng)
    budget = Budget(times, most)
    log_probs = random_log_probs(rng, batch_size, most + 1)
    chances = [Calibration().probabilities(row) for row in log_probs]

    def speed(shares: tuple[int, ...]) -> float:
        tokens = batch_size + sum(sum(chances[row][:share]) for row, share in enumerate(shares))
        return float(tokens / times.at(np.array(float(batch_size + sum(shares)))))

    chosen = choose(budget, log_probs, [False] * batch_size)

    sizes = np.isfinite(log_probs[:, :most]).sum(axis=1)
    assert (np.array(chosen) <= sizes).all()
    best = max(speed(shares) for shares in itertools.product(*(range(size + 1) for size in sizes)))
    assert speed(tuple(chosen)) == pytest.approx(best, rel=1e-12)


def test_rows_that_cost_nothing_are_all_used_and_rows_that_cost_a_step_are_not() -> None:
    log_probs = np.log(np.array([[0.9, 0.5, 0.2, 0.01], [0.4, 0.1, 0.05, 0.001]]))

    assert choose(Budget(FREE, 63), log_probs, [True, True]) == [4, 4]
    assert choose(Budget(PER_ROW, 63), log_probs, [True, True]) == [0, 0]


def test_no_request_gets_more_nodes_than_the_user_allows() -> None:
    assert choose(Budget(FREE, 2), np.log(np.full((3, 5), 0.5)), [True] * 3) == [2, 2, 2]


def test_the_request_with_the_surer_tree_gets_more_nodes() -> None:
    sure, unsure = [-0.05, -0.1, -0.2, -0.3], [-1.5, -2.5, -3.5, -5.0]

    shares = choose(Budget(TYPICAL, 63), np.array([unsure, sure]), [True, True])

    assert shares[1] > shares[0]
    assert shares[1] == 4


def test_the_same_drafter_is_judged_apart_for_greedy_and_for_sampled_requests() -> None:
    budget = Budget(TYPICAL, 63)
    log_probs = np.full((1, 6), -0.3)
    for _ in range(200):
        budget.observe_acceptance(log_probs[0], [True] * 6, True)
        budget.observe_acceptance(log_probs[0], [False] * 6, False)

    assert choose(budget, log_probs, [True]) == [6]
    assert choose(budget, log_probs, [False]) == [0]


def test_slower_passes_than_measured_at_start_shrink_the_budget() -> None:
    log_probs = np.log(np.array([[0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1]]))
    fresh, busy = Budget(TYPICAL, 63), Budget(TYPICAL, 63)
    for _ in range(15):
        expected = float(TYPICAL.at(np.array(5.0)))
        # the same passes, but much time goes elsewhere: then a few rows more hardly matter
        busy.observe_step(StepRecord(1, 4, True, expected, None, expected + 200.0))

    assert choose(busy, log_probs, [True])[0] > choose(fresh, log_probs, [True])[0]


# the floor of the search


def test_passes_with_as_many_nodes_tell_what_those_nodes_cost() -> None:
    budget = Budget(FREE, max_nodes=8)
    log_probs = np.log(np.full((1, 8), 0.5))
    assert choose(budget, log_probs, [True]) == [8]

    for num_nodes in range(1, 9):
        for _ in range(3):
            # rows are free, as at start, but from the fourth node on there is something else to pay
            budget.observe_step(StepRecord(1, num_nodes, True, 1.0 if num_nodes < 4 else 4.0, 0.0, 4.0))

    assert choose(budget, log_probs, [True]) == [3]


def test_a_larger_pass_that_happens_to_be_quicker_makes_no_node_worth_less_than_nothing() -> None:
    budget = Budget(FREE, max_nodes=2)
    for num_nodes, seconds in ((0, 3.0), (1, 2.0), (2, 1.0)):
        for _ in range(3):
            budget.observe_step(StepRecord(1, num_nodes, True, seconds, 0.0, seconds))

    assert choose(budget, np.log(np.full((1, 2), 0.5)), [True]) == [2]
    assert budget.load(1).marginal_probability == 0.0


def test_fewer_nodes_that_were_seen_in_a_slow_moment_are_tried_again() -> None:
    budget = Budget(PER_ROW, max_nodes=3)
    for num_nodes, seconds in ((2, 9.0), (3, 2.0)):
        for _ in range(3):
            budget.observe_step(StepRecord(1, num_nodes, True, seconds, 0.0, seconds))

    # the third node is next to hopeless, and the pass with two is known to take no longer than that with three
    assert choose(budget, np.log(np.array([[0.9, 0.8, 0.001]])), [True]) == [3]
    assert budget.load(1).speed == pytest.approx((1 + 0.9 + 0.8) / 2.0, rel=0.01)
    assert choose(budget, np.log(np.array([[0.9, 0.8]])), [True]) == [2]


def serve(budget: Budget, seconds: Callable[[int], float], num_steps: int) -> list[int]:
    """Return how many nodes were verified in steps of one request whose passes take `seconds` of their nodes."""
    chances = [0.6, 0.4, 0.25, 0.2, 0.15, 0.1, 0.08, 0.06]
    trees = np.log([chances]).tolist()
    verified = []
    for _ in range(num_steps):
        choice = budget.choose(trees, [[-math.inf]], [False])
        (num_nodes,) = choice.num_nodes
        verified.append(num_nodes)
        taken = seconds(num_nodes)
        budget.observe_step(StepRecord(1, num_nodes, num_nodes > 0, taken, 0.1, taken + 0.2, choice.forward_seconds))
    return verified


@pytest.mark.parametrize("mistaken_for", [0.9, 1.1])
@pytest.mark.parametrize("mistaken", [3, 5, 6])
def test_what_passes_at_start_say_wrongly_of_some_numbers_of_nodes_does_not_last(
    mistaken: int, mistaken_for: float
) -> None:
    true_seconds = [10.0 + 0.3 * nodes for nodes in range(9)]
    at_start = [each * (mistaken_for if nodes >= mistaken else 1.0) for nodes, each in enumerate(true_seconds)]
    budget = Budget(StepTimes(np.arange(1.0, 10.0), np.array(at_start)), max_nodes=8)
    rng = np.random.default_rng(0)
    pace = 1.0

    def seconds(num_nodes: int) -> float:
        nonlocal pace
        if rng.random() < 0.02:  # now and then the machine changes its pace
            pace = float(rng.choice([1.0, 1.15, 1.3]))
        return true_seconds[num_nodes] * pace * float(rng.normal(1.0, 0.04))

    verified = serve(budget, seconds, 2000)

    tokens = np.cumsum([1.0, 0.6, 0.4, 0.25, 0.2, 0.15, 0.1, 0.08, 0.06])
    worth = tokens / (np.array(true_seconds) + 0.2)
    late = worth[verified[500:]] / worth.max()
    assert late.mean() > 0.985
    assert set(verified[500:]) > {int(worth.argmax())}


def test_one_choice_in_sixteen_is_the_least_known_of_those_that_promise_nearly_as_much() -> None:
    budget = Budget(FREE, max_nodes=4)
    log_probs = np.log(np.array([[0.9, 0.5, 0.03, 0.02]]))
    chosen = [choose(budget, log_probs, [True]) for _ in range(15)]
    for num_nodes in (2, 2, 2, 4):
        budget.observe_step(StepRecord(1, num_nodes, True, 1.0, 0.0, 1.0))

    trial = budget.choose(log_probs.tolist(), [[-math.inf]], [True])

    assert chosen == [[4]] * 15
    assert trial.num_nodes == [3], "two are known better, and one would lose too much"
    assert trial.forward_seconds == 1.0
    assert budget.load(1).speed == pytest.approx(2.45, rel=0.01), "what is promised is that of the best"
    assert choose(budget, log_probs, [True]) == [4]


def test_a_slower_machine_makes_no_number_of_nodes_look_dearer_than_another() -> None:
    log_probs = np.log(np.array([[0.6, 0.5, 0.4, 0.05]]))
    budget = Budget(TYPICAL, max_nodes=4)
    for num_nodes in (2, 3, 4):
        for _ in range(5):
            expected = TYPICAL.of(1 + num_nodes)
            budget.observe_step(StepRecord(1, num_nodes, True, expected, 0.0, expected))
    before = choose(budget, log_probs, [True])

    for _ in range(8):  # the only one that is seen while the machine is slow
        expected = 1.5 * TYPICAL.of(1 + before[0])
        budget.observe_step(StepRecord(1, before[0], True, expected, 0.0, expected))

    assert choose(budget, log_probs, [True]) == before


TREES, CHAINS = (np.log([chances]).tolist() for chances in ([0.6, 0.5, 0.2], [0.6, 0.2]))


def used_budget(*steps: tuple[int, bool, float]) -> Budget:
    """Return a budget that has seen passes: number of nodes, whether they branched, seconds, for 1 expected."""
    budget = Budget(FREE, 8)
    for num_nodes, has_branches, seconds in steps:
        for _ in range(15):
            budget.observe_step(StepRecord(1, num_nodes, has_branches, seconds, 0.0, seconds))
    return budget


@pytest.mark.parametrize(
    ("tree_seconds", "chain_seconds", "expected"),
    [(1.0, 1.0, ([3], False)), (1.2, 1.0, ([3], False)), (1.4, 1.0, ([2], True)), (1.4, 1.2, ([3], False))],
)
def test_branches_are_verified_where_they_are_worth_what_they_cost(
    tree_seconds: float, chain_seconds: float, expected: tuple[list[int], bool]
) -> None:
    budget = used_budget((3, True, tree_seconds), (2, False, chain_seconds))

    choice = budget.choose(TREES, CHAINS, [True])

    assert (choice.num_nodes, choice.as_chains) == expected


def test_as_good_a_chain_is_taken_for_the_tree() -> None:
    assert Budget(FREE, 8).choose(CHAINS, CHAINS, [True]).as_chains


def test_what_has_not_been_verified_for_long_is_tried_again() -> None:
    budget = used_budget((3, True, 5.0))
    chain = StepRecord(1, 2, False, 1.0, 0.0, 1.0)
    for _ in range(255):
        budget.observe_step(chain)
    assert budget.choose(TREES, CHAINS, [True]).as_chains

    budget.observe_step(chain)

    choice = budget.choose(TREES, CHAINS, [True])
    assert (choice.num_nodes, choice.as_chains) == ([3], False)


@settings(max_examples=200, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 8))
def test_the_floor_cuts_no_node_that_would_be_chosen_again(seed: int, batch_size: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    budget = Budget(random_times(rng), most)
    for greedy in (True, False):
        budget.observe_acceptance(-rng.exponential(2.0, size=200), rng.random(200) < rng.random(), greedy)
    log_probs = random_log_probs(rng, batch_size, most)
    is_greedy = (rng.random(batch_size) < 0.5).tolist()

    chosen = choose(budget, log_probs, is_greedy)
    floor = budget.floor(is_greedy)

    assert all((log_probs[row, :share] > floor).all() for row, share in enumerate(chosen))


def test_before_anything_was_chosen_the_search_has_no_floor() -> None:
    assert Budget(TYPICAL, 8).floor([True]) == -math.inf


def test_where_rows_are_dear_the_search_ends_early() -> None:
    budget = Budget(TYPICAL, 8)
    choose(budget, np.log(np.array([[0.6, 0.3, 0.1, 0.05]])), [True])

    assert -math.inf < budget.floor([True]) < 0.0


def test_how_deep_greedy_requests_are_searched_for_is_not_what_sampled_ones_are_judged_by() -> None:
    budget = Budget(TYPICAL, 8)
    budget.observe_acceptance([-0.5] * 1000, [False] * 1000, is_greedy=False)
    choose(budget, np.log(np.array([[0.6, 0.3, 0.1, 0.05]])), [True])

    assert budget.floor([False]) > budget.floor([True])
    assert budget.floor([True, False]) == budget.floor([True, True])


# pauses


def drafts_until_pause(budget: Budget, log_probs: Floats) -> int:
    """Return how many steps draft and choose before one does not."""
    for count in range(1000):
        if not budget.should_draft(len(log_probs)):
            return count
        choose(budget, log_probs, [True] * len(log_probs))
    raise AssertionError("drafting never paused")


def finish_trial(budget: Budget, log_probs: Floats) -> list[int]:
    """Return how many nodes were chosen for the first request in the choices that decide whether to draft on."""
    chosen = []
    while budget.load(len(log_probs)).trial_promises is not None:
        chosen.append(choose(budget, log_probs, [True] * len(log_probs))[0])
    return chosen


def pause_length(budget: Budget, batch_size: int) -> int:
    """Return how many steps in a row do not draft, the one that began the pause included."""
    for count in itertools.count(1):
        if budget.should_draft(batch_size):
            return count
    raise AssertionError


def losing_budget(draft_seconds: float = 0.05) -> Budget:
    """Return a budget that has seen what makes drafting lose: rows that cost a step, and time spent on drafting."""
    budget = Budget(PER_ROW, 8)
    for _ in range(15):
        budget.observe_step(StepRecord(1, 2, True, 3.0, draft_seconds, 3.0 + draft_seconds))
        budget.observe_step(plain_step(1.0))
    return budget


@pytest.mark.parametrize(
    ("draft_seconds", "expected"),
    [
        # eight searches of a twentieth of a step, in 120 steps at most
        (0.05, [1, 2, 4, 8, 16, 32, 64, 120, 120]),
        # and in 128 however dear they are: what made them dear may be over
        (0.2, [1, 2, 4, 8, 16, 32, 64, 128, 128]),
        (5.0, [1, 2, 4, 8, 16, 32, 64, 128, 128]),
        (0.0, [1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_drafting_pauses_when_it_does_not_pay_and_trials_become_rare(
    monkeypatch: pytest.MonkeyPatch, draft_seconds: float, expected: list[int]
) -> None:
    monkeypatch.setattr(budget_module, "_FIRST_PLAIN_STEP", -1)  # no plain step between
    budget = losing_budget(draft_seconds)
    log_probs = np.log(np.array([[0.3, 0.1]]))
    assert drafts_until_pause(budget, log_probs) >= 1

    lengths = []
    for _ in expected:
        lengths.append(pause_length(budget, 1) - 1)
        finish_trial(budget, log_probs)
        assert not budget.should_draft(1)

    assert lengths == expected


def test_of_a_pause_the_last_step_and_one_in_eight_before_are_learnt_from() -> None:
    budget = Budget(FREE, 8)
    budget.load(1).pause = 28
    wanted = []
    while budget.load(1).pause:
        assert not budget.should_draft(1)
        wanted.append(budget.wants_plain_step(1))

    assert [27 - index for index, each in enumerate(wanted) if each] == [24, 16, 8, 0]


def test_drafts_that_do_not_pay_are_not_verified_but_once_in_four_times() -> None:
    budget = Budget(FREE, 8)
    log_probs = np.full((1, 1), -0.75)
    for _ in range(15):  # the search takes all that a draft brings
        budget.observe_step(StepRecord(1, 1, True, 1.0, 2.0, 3.0))
        budget.observe_step(plain_step(1.0))
    verified = []
    for _ in range(8):
        budget.load(1).trial_promises = []
        verified.append(finish_trial(budget, log_probs))

    assert budget.load(1).gain < 0.7
    assert verified == [[0], [0], [0], [1], [0], [0], [0], [1]], "and what is hopeless is seen at once"


def test_until_its_costs_are_known_drafting_is_verified_and_every_promise_counts_alone() -> None:
    budget = Budget(FREE, 8)
    likely, unlikely = np.full((1, 1), -0.05), np.full((1, 1), -5.0)
    for num_seen in range(3):
        assert choose(budget, likely, [True]) == [1]
        assert budget.load(1).gain > 1.9
        assert choose(budget, unlikely, [True]) == [1]
        assert budget.load(1).gain < 1.03
        assert budget.load(1).next_pause == 1, f"{num_seen} steps seen"
        budget.observe_step(StepRecord(1, 1, True, 1.0, 0.01, 1.01))

    choose(budget, likely, [True])

    assert budget.load(1).gain < 1.2


@pytest.mark.parametrize(
    ("batch_size", "promise", "goes_on"),
    [
        (1, 1.01, False),
        (1, 1.02, False),
        (1, 1.04, True),
        (1, 1.2, True),
        # requests that began together end apart, and leave small batches behind
        (4, 1.06, False),
        (7, 1.06, False),
        (4, 1.08, True),
        (16, 1.1, False),
        (16, 1.12, True),
    ],
)
def test_a_promise_that_may_be_mistaken_or_not_be_kept_is_no_reason_to_draft(
    batch_size: int, promise: float, goes_on: bool
) -> None:
    budget = Budget(FREE, 1)
    log_prob = -0.75
    draft_seconds = (1 + math.exp(log_prob)) / promise - 1
    for _ in range(20):
        budget.observe_step(StepRecord(batch_size, batch_size, True, 1.0, draft_seconds, 1.0 + draft_seconds))
        budget.observe_step(plain_step(1.0, batch_size))
    budget.load(batch_size).trial_promises = []

    chosen = finish_trial(budget, np.full((batch_size, 1), log_prob))

    assert len(chosen) == math.ceil(8 / batch_size)
    assert chosen[:-1] == [1] * (len(chosen) - 1)
    assert chosen[-1] == goes_on

    assert budget.load(batch_size).gain == pytest.approx(promise)
    assert budget.should_draft(batch_size) is goes_on


def test_a_trial_that_pays_resumes_drafting_and_forgets_the_pauses() -> None:
    budget = losing_budget()
    hopeless, certain = np.log(np.array([[0.3, 0.1]])), np.log(np.array([[0.999, 0.999, 0.999, 0.999]]))
    drafts_until_pause(budget, hopeless)
    for _ in range(4):
        pause_length(budget, 1)
        finish_trial(budget, hopeless)
        assert not budget.should_draft(1)
    pause_length(budget, 1)
    assert budget.load(1).next_pause == 32
    for _ in range(100):  # meanwhile drafting has become cheap
        budget.observe_step(StepRecord(1, 4, True, 1.0, 0.01, 1.01))

    finish_trial(budget, certain)

    assert budget.load(1).gain > 1.0
    assert budget.load(1).next_pause == 1
    assert budget.should_draft(1)


@pytest.mark.parametrize(("num_steps", "expected"), [(3, 2.0), (4, 2.0 / 1.25), (20, 2.0 / 1.25)])
def test_passes_that_take_longer_than_foretold_make_promises_smaller(num_steps: int, expected: float) -> None:
    budget = Budget(FREE, max_nodes=1)
    for _ in range(num_steps):  # the first three are foretold by nothing that was seen
        budget.observe_step(StepRecord(1, 1, False, 1.0, 0.0, 1.0, foretold_seconds=0.8))
    budget.load(1).trial_promises = []

    choice = budget.choose([[0.0]], [[-math.inf]], [True])

    assert budget.load(1).gain == pytest.approx(expected)
    assert choice.forward_seconds == 1.0, "what is foretold of the next pass is not changed by that"


def test_one_bad_promise_outside_a_trial_does_not_stop_drafting() -> None:
    budget = losing_budget()
    budget.load(1).gain = 1.5
    choose(budget, np.log(np.array([[0.3, 0.1]])), [True])

    assert budget.should_draft(1)


@pytest.mark.parametrize(("batch_size", "weight"), [(1, 0.025), (2, 0.05), (4, 0.1), (16, 0.1)])
def test_the_promise_of_a_few_requests_moves_the_average_less(batch_size: int, weight: float) -> None:
    budget = Budget(FREE, 1)
    for _ in range(15):
        budget.observe_step(StepRecord(batch_size, batch_size, True, 1.0, 0.0, 1.0))
        budget.observe_step(plain_step(1.0, batch_size))
    budget.load(batch_size).gain = 3.0

    choose(budget, np.zeros((batch_size, 1)), [True] * batch_size)

    assert budget.load(batch_size).gain == pytest.approx(3.0 - weight)


def test_loads_are_judged_apart() -> None:
    budget = losing_budget()
    drafts_until_pause(budget, np.log(np.array([[0.3, 0.1]])))

    assert not budget.should_draft(1)
    assert budget.should_draft(8)
    assert budget.load(8) is budget.load(15)
    assert budget.load(8) is not budget.load(16)


def test_plain_steps_are_measured_soon_after_the_start_and_now_and_then_afterwards() -> None:
    budget = Budget(FREE, 8)
    log_probs = np.log(np.array([[0.9, 0.8]]))
    drafted = []
    for _ in range(1100):
        drafted.append(budget.should_draft(1))
        if drafted[-1]:
            choose(budget, log_probs, [True])

    skipped = [step for step, each in enumerate(drafted) if not each]
    # two in a row: the step between them has neither drafts nor drafting
    assert all(pair[1] == pair[0] + 1 for pair in zip(skipped[::2], skipped[1::2], strict=True))
    asked_after = [step - number for number, step in enumerate(skipped[::2])]
    assert asked_after == [7, 15, 31, 63, 127, 255, 511, 767, 1023]


def test_plain_steps_that_are_short_are_measured_when_others_have_warmed_them_up() -> None:
    budget = Budget(StepTimes(np.array([1.0]), np.array([0.001])), 8)
    drafted = []
    for _ in range(14):
        drafted.append(budget.should_draft(1))
        if drafted[-1]:
            choose(budget, np.log(np.array([[0.9, 0.8]])), [True])
        elif budget.wants_plain_step(1):
            assert drafted[-4:] == [False] * 4, "only the last one is learnt from"

    assert drafted == [True] * 7 + [False] * 4 + [True] * 3


def hopeful_budget(*plain_seconds: float) -> Budget:
    """Return a budget that has seen drafts of 1.1 seconds, of which 0.1 are drafting, and plain steps."""
    budget = Budget(FREE, 8)
    for _ in range(15):
        budget.observe_step(StepRecord(1, 1, True, 1.0, 0.1, 1.1))
    for seconds in plain_seconds:
        budget.observe_step(plain_step(seconds))
    return budget


@pytest.mark.parametrize(
    ("plain_seconds", "expected"),
    [
        ((), 1.0),
        # what is known of one or two is what they take at least
        ((5.0,), 1.0),
        ((5.0, 6.0), 1.0),
        ((0.9,), 0.9),
        ((0.9, 5.0), 0.9),
        ((0.9, 5.0, 0.95), 0.95),
        ((5.0, 6.0, 0.9), 5.0),
    ],
    ids=str,
)
def test_one_slow_plain_step_does_not_make_drafts_look_good(plain_seconds: tuple[float, ...], expected: float) -> None:
    budget = hopeful_budget(*plain_seconds)
    budget.load(1).trial_promises = []  # the next choices decide alone
    log_prob = -0.75

    choose(budget, np.array([[log_prob]]), [True])

    assert budget.load(1).gain == pytest.approx((1 + math.exp(log_prob)) / 1.1 * expected)


def test_what_plain_steps_take_besides_their_forward_pass_is_not_what_drafted_ones_take() -> None:
    budget = Budget(FREE, 8)
    for _ in range(15):
        budget.observe_step(StepRecord(1, 1, True, 1.0, 0.1, 1.6))
        budget.observe_step(StepRecord(1, 0, False, 1.0, None, 1.2))
    budget.load(1).trial_promises = []  # the next choices decide alone

    choose(budget, np.array([[-0.75]]), [True])

    assert budget.load(1).gain == pytest.approx((1 + math.exp(-0.75)) / 1.6 * 1.2)


def test_what_a_step_takes_that_drafts_and_verifies_nothing_is_not_what_one_with_drafts_takes() -> None:
    budget = Budget(FREE, 8)
    for _ in range(15):  # as where drafting is tried now and then: nothing to verify, then drafts, then neither
        budget.observe_step(StepRecord(1, 0, False, 1.0, 0.1, 1.2))
        budget.observe_step(StepRecord(1, 0, False, 1.0, 0.1, 1.2))
        budget.observe_step(StepRecord(1, 1, True, 1.0, None, 1.5))
        budget.observe_step(plain_step(1.1))
    budget.load(1).trial_promises = []  # the next choices decide alone

    choose(budget, np.array([[-0.75]]), [True])

    assert budget.load(1).gain == pytest.approx((1 + math.exp(-0.75)) / 1.6 * 1.1)


def test_what_was_learnt_is_reported_by_load() -> None:
    budget = Budget(TYPICAL, 8)
    budget.observe_step(plain_step(20.0, batch_size=3))
    choose(budget, np.log(np.array([[0.9, 0.8]])), [True])

    report = budget.as_dict()

    assert set(report) == {"<2", "<4"}
    assert report["<4"]["plain_ratio"] == pytest.approx(20.0 / float(TYPICAL.at(np.array(3.0))))
    assert report["<2"]["gain"] > 1.0
    assert (report["<4"]["chain_ratio"], report["<4"]["tree_ratio"]) == (1.0, 1.0)
    assert math.isnan(report["<4"]["draft_ms"])
    # vLLM's messages between processes carry plain numbers only
    assert {type(value) for record in report.values() for value in record.values()} == {float}
