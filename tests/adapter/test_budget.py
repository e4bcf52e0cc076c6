from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapter.budgets import FREE, PER_ROW, TYPICAL, choose, plain_step
from vllm_redrafter.adapter.budget import Budget
from vllm_redrafter.adapter.calibration import Calibration
from vllm_redrafter.adapter.costs import Floats, StepRecord, StepTimes

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
        choice = budget.choose(trees, [[-math.inf]], [True])
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
    tokens = np.cumsum([1.0, 0.6, 0.4, 0.25, 0.2, 0.15, 0.1, 0.08, 0.06])
    worth = tokens / (np.array(true_seconds) + 0.2)

    late = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        pace = 1.0

        def seconds(num_nodes: int, rng: np.random.Generator = rng) -> float:
            nonlocal pace
            if rng.random() < 0.02:  # now and then the machine changes its pace
                pace = float(rng.choice([1.0, 1.15, 1.3]))
            return true_seconds[num_nodes] * pace * float(rng.normal(1.0, 0.04))

        verified = serve(Budget(StepTimes(np.arange(1.0, 10.0), np.array(at_start)), max_nodes=8), seconds, 2000)
        assert set(verified[500:]) > {int(worth.argmax())}
        late.append((worth[verified[500:]] / worth.max()).mean())

    assert np.mean(late) > 0.985


def test_plain_steps_do_not_seem_to_slow_down_because_drafted_ones_are_chosen_for_their_luck() -> None:
    true_seconds = [10.0 + 0.3 * nodes for nodes in range(9)]
    believed = []
    for seed in range(10):
        budget = Budget(StepTimes(np.arange(1.0, 10.0), np.array(true_seconds)), max_nodes=8)
        rng = np.random.default_rng(seed)

        def seconds(num_nodes: int, rng: np.random.Generator = rng) -> float:
            return float(true_seconds[num_nodes] * rng.lognormal(0.0, 0.15))

        for lesson in range(40):
            budget.observe_step(plain_step(seconds(0)))
            # passes with the number of nodes whose last ones were lucky take longer than those did
            serve(budget, seconds, 256)
            if lesson >= 10:
                costs = budget.load(1).costs
                believed.append(costs.plain_step(true_seconds[0], costs.trees))

    assert np.mean(believed) == pytest.approx(true_seconds[0], rel=0.02)


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
    log_probs = np.log(np.array([[0.6, 0.3, 0.1, 0.05]] * 2))
    choose(budget, log_probs, [True, True])
    budget.load(2, num_sampled=2).marginal_probability = budget.load(2).marginal_probability

    assert budget.floor([False, False]) > budget.floor([True, True]) > -math.inf
    assert budget.floor([True, False]) == budget.floor([True, True])


def test_what_was_learnt_is_reported_by_load() -> None:
    budget = Budget(TYPICAL, 8)
    budget.observe_step(plain_step(20.0, batch_size=3)._replace(num_sampled=2))
    budget.observe_step(plain_step(10.0, batch_size=2)._replace(num_sampled=1))
    choose(budget, np.log(np.array([[0.9, 0.8]])), [True])

    report = budget.as_dict()

    assert list(report) == ["<2 greedy", "<4 greedy", "<4 sampled"]
    assert report["<4 sampled"]["plain_ratio"] == pytest.approx(20.0 / float(TYPICAL.at(np.array(3.0))))
    assert report["<2 greedy"]["gain"] > 1.0
    assert (report["<4 greedy"]["chain_ratio"], report["<4 greedy"]["tree_ratio"]) == (1.0, 1.0)
    assert report["<4 greedy"]["draft_ms"] == 0.0
    # vLLM's messages between processes carry plain numbers only
    assert {type(value) for record in report.values() for value in record.values()} == {float}
