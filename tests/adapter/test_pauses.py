from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tests.adapter.budgets import FREE, PER_ROW, choose, plain_step, promised
from vllm_redrafter.adapter import pauses
from vllm_redrafter.adapter.budget import Budget
from vllm_redrafter.adapter.costs import Floats, StepRecord, StepTimes


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
    while budget.load(len(log_probs)).pauses.trial is not None:
        chosen.append(choose(budget, log_probs, [True] * len(log_probs))[0])
    return chosen


def pause_length(budget: Budget, batch_size: int) -> int:
    """Return how many steps in a row do not draft, the one that began the pause included."""
    for count in itertools.count(1):
        if budget.should_draft(batch_size):
            return count
    raise AssertionError


def searching_budget(batch_size: int) -> Budget:
    """Return a budget that has seen searches which take all that a draft brings."""
    budget = Budget(FREE, 8)
    for _ in range(15):
        budget.observe_step(StepRecord(batch_size, batch_size, True, 1.0, 2.0, 3.0))
        budget.observe_step(plain_step(1.0, batch_size))
    return budget


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
        # and in 256 however dear they are: what made them dear may be over
        (0.2, [1, 2, 4, 8, 16, 32, 64, 128, 256, 256]),
        (5.0, [1, 2, 4, 8, 16, 32, 64, 128, 256, 256]),
        (0.0, [1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_drafting_pauses_when_it_does_not_pay_and_trials_become_rare(
    monkeypatch: pytest.MonkeyPatch, draft_seconds: float, expected: list[int]
) -> None:
    monkeypatch.setattr(pauses, "_FIRST_PLAIN_STEP", -1)  # no plain step between
    budget = losing_budget(draft_seconds)
    log_probs = np.log(np.array([[0.3, 0.1]]))
    assert drafts_until_pause(budget, log_probs) >= 1

    lengths = []
    for _ in expected:
        lengths.append(pause_length(budget, 1) - 1)
        finish_trial(budget, log_probs)
        assert not budget.should_draft(1)

    assert lengths == expected


@pytest.mark.parametrize(
    ("pass_seconds", "search_seconds", "expected"),
    [
        # a second: shorter steps are tried again after more of them
        (0.001, 0.004, 1000),
        (0.001, 10.0, 1000),
        (0.004, 10.0, 256),
        # a trial costs what its eight searches take, and what is lost by turning to it and back
        (0.001, 0.0001, 690),
        (0.001, 0.0, 450),
    ],
)
def test_the_longest_pause_hangs_on_what_a_trial_costs_and_on_how_long_steps_are(
    pass_seconds: float, search_seconds: float, expected: int
) -> None:
    of_one = pauses.Pauses(0, pass_seconds)
    for _ in range(12):
        of_one.trial = []
        for _ in range(8):
            of_one.add_promise(0.9, 1, is_known=True)
        of_one.limit(search_seconds, pass_seconds)
        of_one.left = 0
        assert not of_one.should_draft()

    assert of_one.left == pytest.approx(expected, abs=1)


def test_of_a_pause_the_last_step_and_one_in_sixteen_before_are_learnt_from() -> None:
    budget = Budget(FREE, 8)
    budget.load(1).pauses.left = 60
    wanted = []
    while budget.load(1).pauses.left:
        assert not budget.should_draft(1)
        wanted.append(budget.wants_plain_step(1))

    assert [59 - index for index, each in enumerate(wanted) if each] == [48, 32, 16, 0]


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 18, 60])
def test_steps_that_are_skipped_count_and_are_none_that_would_be_learnt_from(length: int) -> None:
    budget = Budget(FREE, 8)
    load = budget.load(4)
    load.pauses.gain, load.pauses.next_length = 0.5, length
    assert not budget.should_draft(4), "a pause begins"
    load.num_unverified_steps = skipped = wanted = asked = 0
    while not budget.should_draft(4):
        asked += 1
        wanted += budget.wants_plain_step(4)
        skipped += budget.skip_steps(4)

    assert asked + skipped == length
    assert load.num_unverified_steps == length + 1
    assert wanted == math.ceil(length / 16)
    assert asked <= 2 * wanted


def test_what_greedy_requests_promise_decides_nothing_about_sampled_ones() -> None:
    budget = Budget(FREE, 8)
    budget.load(4, num_sampled=3).pauses.gain = 0.5

    assert [budget.should_draft(4, num_sampled) for num_sampled in range(5)] == [True, True, True, False, False]
    assert budget.load(4, num_sampled=2) is budget.load(4)
    budget.load(4, num_sampled=4).pauses.left = 8
    assert (budget.skip_steps(4), budget.skip_steps(4, 4)) == (0, 7)


def test_drafts_that_do_not_pay_are_not_verified_but_once_in_128_steps() -> None:
    budget, log_probs = searching_budget(1), np.full((1, 1), -0.75)
    budget.load(1).pauses.gain = 0.5
    verified_after = []
    for step in range(1, 1200):
        if budget.should_draft(1):
            verified_after += [step] * choose(budget, log_probs, [True])[0]
            assert budget.load(1).pauses.trial is None, "what is hopeless is seen at once"

    gaps = np.diff(verified_after)
    assert len(gaps) > 2
    assert min(gaps) >= 128


def test_drafts_that_were_verified_on_trial_are_not_verified_again_in_the_next_trials() -> None:
    budget = losing_budget(draft_seconds=2.0)
    load = budget.load(1)
    load.pauses.gain, load.num_unverified_steps = 0.5, 127
    verified = []
    while sum(verified) < 2:
        if budget.should_draft(1):
            verified += choose(budget, np.log(np.array([[0.9]])), [True])
            load.pauses.next_length = 32

    # a trial in every 34th step
    assert verified == [1, 0, 0, 0, 1]


def test_the_more_requests_there_are_the_more_rarely_drafts_are_verified_that_do_not_pay() -> None:
    budget = searching_budget(4)
    load = budget.load(4)
    verified = []
    for num_steps in (511, 512):
        load.pauses.trial, load.num_unverified_steps = [], num_steps
        verified.append(sum(choose(budget, np.full((4, 1), -0.75), [True] * 4)))

    assert verified == [0, 4]


def test_what_was_known_before_a_long_pause_is_forgotten_once() -> None:
    pauses_of_one = Budget(FREE, 8).load(1).pauses
    forgets = []
    for length in (8, 16):
        pauses_of_one.next_length, pauses_of_one.trial = length, []
        for _ in range(3):
            forgets.append(pauses_of_one.is_long_over())
            pauses_of_one.add_promise(1.0, 1, is_known=True)

    assert forgets == [False, False, False, True, False, False]


def serve_one(budget: Budget, num_steps: int, overhead: float) -> int:
    """Return how many of so many steps verified drafts; a pass takes 1, and what a step with drafts does besides more.

    Args:
        overhead: seconds, half of them for drafting.
    """
    num_nodes = num_verified = 0
    for _ in range(num_steps):
        num_verified += num_nodes > 0
        total = 1.1 + (overhead if num_nodes else 0.0)
        if budget.should_draft(1):
            record = StepRecord(1, num_nodes, True, 1.0, overhead / 2, total)
            (num_nodes,) = choose(budget, np.log(np.array([[0.9, 0.5]])), [True])
        else:
            record, num_nodes = StepRecord(1, num_nodes, True, 1.0, None, total), 0
        budget.observe_step(record)
    return num_verified


@pytest.mark.parametrize("slow_steps", [20, 100, 300])
def test_a_slow_moment_does_not_keep_drafts_off_for_long(slow_steps: int) -> None:
    budget = Budget(FREE, 2)
    serve_one(budget, slow_steps, overhead=5.0)
    assert serve_one(budget, 1, overhead=5.0) == 0, "drafts are off"

    # two trials outvote those of the slow moment, and pauses are 256 steps at most
    serve_one(budget, 3 * 260, overhead=0.3)

    assert serve_one(budget, 100, overhead=0.3) > 80


def test_until_its_costs_are_known_drafting_is_verified_and_every_promise_counts_alone() -> None:
    budget = Budget(FREE, 8)
    likely, unlikely = np.full((1, 1), -0.05), np.full((1, 1), -5.0)
    for num_seen in range(3):
        assert choose(budget, likely, [True]) == [1]
        assert budget.load(1).pauses.gain > 1.9
        assert choose(budget, unlikely, [True]) == [1]
        assert budget.load(1).pauses.gain < 1.03
        assert budget.load(1).pauses.next_length == 1, f"{num_seen} steps seen"
        budget.observe_step(StepRecord(1, 1, True, 1.0, 0.01, 1.01))

    choose(budget, likely, [True])

    assert budget.load(1).pauses.gain < 1.2


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
    budget.load(batch_size).pauses.gain, budget.load(batch_size).pauses.trial = promise, []

    chosen = finish_trial(budget, np.full((batch_size, 1), log_prob))

    assert len(chosen) == math.ceil(8 / batch_size)
    assert chosen[:-1] == [1] * (len(chosen) - 1)
    assert chosen[-1] == goes_on

    assert budget.load(batch_size).pauses.gain == pytest.approx(promise)
    assert budget.should_draft(batch_size) is goes_on


@pytest.mark.parametrize(
    ("batch_size", "pass_seconds", "expected"), [(1, 1e-3, 1.13), (4, 2e-3, 1.12), (1, 20e-3, 1.035), (16, 0.1, 1.111)]
)
def test_short_steps_must_gain_more(batch_size: int, pass_seconds: float, expected: float) -> None:
    # of any other number of requests a pass takes as good as no time
    budget = Budget(StepTimes(np.array([0.0, batch_size, 64.0]), np.array([1e-9, pass_seconds, 1e-9])), 8)

    assert budget.load(batch_size).pauses.least_gain == pytest.approx(expected)


@pytest.mark.parametrize(
    ("before", "promises", "expected"),
    [(1.0, [1.3] * 8, 1.15), (1.0, [1.0, 1.6] * 4, 1.15), (0.2, [1.3] * 8, 1.0), (0.9, [0.6], 0.75)],
    ids=["steady", "one in two", "hopeless before", "hopeless now"],
)
def test_a_trial_counts_as_much_as_what_was_known_before_it(
    before: float, promises: list[float], expected: float
) -> None:
    pauses_of_one = Budget(FREE, 8).load(1).pauses
    pauses_of_one.gain, pauses_of_one.trial = before, []

    for promise in promises:
        assert pauses_of_one.trial is not None
        pauses_of_one.add_promise(promise, 1, is_known=True)

    assert pauses_of_one.trial is None
    assert pauses_of_one.gain == pytest.approx(expected)


def test_a_trial_that_pays_resumes_drafting_and_every_choice_that_pays_shortens_the_next_pause() -> None:
    budget = losing_budget()
    hopeless, certain = np.log(np.array([[0.3, 0.1]])), np.log(np.array([[0.999, 0.999, 0.999, 0.999]]))
    drafts_until_pause(budget, hopeless)
    for _ in range(4):
        pause_length(budget, 1)
        finish_trial(budget, hopeless)
        assert not budget.should_draft(1)
    pause_length(budget, 1)
    of_one = budget.load(1).pauses
    assert of_one.next_length == 32
    for _ in range(100):  # meanwhile drafting has become cheap
        budget.observe_step(StepRecord(1, 4, True, 1.0, 0.01, 1.01))

    finish_trial(budget, certain)

    assert of_one.gain > 1.0
    assert budget.should_draft(1)
    lengths = [of_one.next_length]
    for _ in range(40):
        choose(budget, certain, [True])
        lengths.append(of_one.next_length)
    assert lengths == [*range(31, 1, -1), *[1] * 11]


def test_a_trial_that_was_no_more_than_lucky_does_not_begin_the_pauses_anew() -> None:
    of_one = Budget(FREE, 8).load(1).pauses
    of_one.next_length, of_one.gain, of_one.trial = 128, 1.0, []
    for promise in [1.2] * 8 + [0.7] * 4:
        of_one.add_promise(promise, 4, is_known=True)

    assert not of_one.pays()
    assert not of_one.should_draft()
    assert of_one.left > 100


@pytest.mark.parametrize(("num_steps", "expected"), [(3, 2.0), (4, 2.0 / 1.25), (20, 2.0 / 1.25)])
def test_passes_that_take_longer_than_foretold_make_promises_smaller(num_steps: int, expected: float) -> None:
    budget = Budget(FREE, max_nodes=1)
    for _ in range(num_steps):  # the first three are foretold by nothing that was seen
        budget.observe_step(StepRecord(1, 1, False, 1.0, 0.0, 1.0, foretold_seconds=0.8))

    assert promised(budget, np.zeros((1, 1))) == pytest.approx(expected)

    choice = budget.choose([[0.0]], [[-math.inf]], [True])
    assert choice.forward_seconds == 1.0, "what is foretold of the next pass is not changed by that"


@pytest.mark.parametrize("slow", [0.7, 1.0, 1.3])
def test_drafts_and_plain_steps_that_were_seen_at_different_paces_of_the_machine_are_compared_at_one(
    slow: float,
) -> None:
    budget = Budget(FREE, max_nodes=1)

    def see(pace: float, num_drafted: int, num_plain: int) -> None:
        for _ in range(num_drafted):
            budget.observe_step(StepRecord(1, 1, True, pace, 0.1 * pace, 1.2 * pace))
        for _ in range(num_plain):
            budget.observe_step(plain_step(pace)._replace(total_seconds=1.1 * pace))

    see(1.0, num_drafted=7, num_plain=7)
    see(slow, num_drafted=0, num_plain=15)
    see(1.0, num_drafted=7, num_plain=0)

    # two tokens in 1.2, of which drafting took 0.1, where plain steps take 1.1: whenever they were seen
    assert promised(budget, np.zeros((1, 1))) == pytest.approx(2 / 1.2 * 1.1)


def test_the_machines_pace_is_one_for_all_loads() -> None:
    budget = Budget(FREE, max_nodes=1)
    for batch_size in (1, 4):
        for _ in range(3):
            budget.observe_step(plain_step(1.0, batch_size))
    for _ in range(7):
        budget.observe_step(plain_step(1.5, batch_size=4))

    costs = budget.load(1).costs
    assert costs.plain_step(1.0, costs.chains) == 1.5


def test_passes_that_take_less_than_foretold_make_no_promise_larger() -> None:
    budget = Budget(FREE, max_nodes=1)
    for _ in range(8):
        budget.observe_step(StepRecord(1, 1, True, 1.0, 0.0, 1.0, foretold_seconds=1.25))

    assert promised(budget, np.zeros((1, 1))) == pytest.approx(2.0)


def test_one_bad_promise_outside_a_trial_does_not_stop_drafting() -> None:
    budget = losing_budget()
    budget.load(1).pauses.gain = 1.5
    choose(budget, np.log(np.array([[0.3, 0.1]])), [True])

    assert budget.should_draft(1)


@pytest.mark.parametrize(("batch_size", "weight"), [(1, 0.025), (2, 0.05), (4, 0.1), (16, 0.1)])
def test_the_promise_of_a_few_requests_moves_the_average_less(batch_size: int, weight: float) -> None:
    budget = Budget(FREE, 1)
    for _ in range(15):
        budget.observe_step(StepRecord(batch_size, batch_size, True, 1.0, 0.0, 1.0))
        budget.observe_step(plain_step(1.0, batch_size))
    budget.load(batch_size).pauses.gain = 3.0

    choose(budget, np.zeros((batch_size, 1)), [True] * batch_size)

    assert budget.load(batch_size).pauses.gain == pytest.approx(3.0 - weight)


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


def short_steps() -> Budget:
    """Return a budget for steps of a millisecond."""
    return Budget(StepTimes(np.array([1.0]), np.array([0.001])), 8)


def test_plain_steps_that_are_short_are_measured_when_others_have_warmed_them_up() -> None:
    budget = short_steps()
    drafted, learnt_from = [], []
    for step in range(20):
        drafted.append(budget.should_draft(1))
        if drafted[-1]:
            choose(budget, np.log(np.array([[0.9, 0.8]])), [True])
        elif budget.wants_plain_step(1):
            learnt_from.append(step)

    # the first one that does not draft verifies what was drafted before it, and eight are cold
    assert drafted == [True] * 7 + [False] * 10 + [True] * 3
    assert learnt_from == [16]


@pytest.mark.parametrize(("length", "expected"), [(1, []), (8, []), (9, [0]), (16, [0]), (17, [0]), (25, [16, 0])])
def test_short_pauses_between_short_steps_teach_nothing_about_plain_ones(length: int, expected: list[int]) -> None:
    budget = short_steps()
    of_one = budget.load(1).pauses
    of_one.gain, of_one.next_length = 0.5, length
    assert not budget.should_draft(1), "a pause begins"
    learnt_from = []
    while not budget.should_draft(1):
        if budget.wants_plain_step(1):
            learnt_from.append(of_one.left)
        budget.skip_steps(1)

    assert learnt_from == expected


def test_every_draft_makes_short_plain_steps_cold_again() -> None:
    of_one = short_steps().load(1).pauses
    of_one.left = 16
    while not of_one.should_draft():
        pass
    of_one.left = 9  # as where a plain step is due
    learnt_from = []
    while not of_one.should_draft():
        if of_one.wants_plain_step():
            learnt_from.append(of_one.left)

    assert learnt_from == [], "the first of the nine still verifies what was drafted"


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

    assert promised(budget, np.array([[-0.75]])) == pytest.approx((1 + math.exp(-0.75)) / 1.1 * expected)


def test_what_plain_steps_take_besides_their_forward_pass_is_not_what_drafted_ones_take() -> None:
    budget = Budget(FREE, 8)
    for _ in range(15):
        budget.observe_step(StepRecord(1, 1, True, 1.0, 0.1, 1.6))
        budget.observe_step(StepRecord(1, 0, False, 1.0, None, 1.2))

    assert promised(budget, np.array([[-0.75]])) == pytest.approx((1 + math.exp(-0.75)) / 1.6 * 1.2)


def test_what_a_step_takes_that_drafts_and_verifies_nothing_is_not_what_one_with_drafts_takes() -> None:
    budget = Budget(FREE, 8)
    for _ in range(15):  # as where drafting is tried now and then: nothing to verify, then drafts, then neither
        budget.observe_step(StepRecord(1, 0, False, 1.0, 0.1, 1.2))
        budget.observe_step(StepRecord(1, 0, False, 1.0, 0.1, 1.2))
        budget.observe_step(StepRecord(1, 1, True, 1.0, None, 1.5))
        budget.observe_step(plain_step(1.1))

    assert promised(budget, np.array([[-0.75]])) == pytest.approx((1 + math.exp(-0.75)) / 1.6 * 1.1)
