from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.conftest import FakePair
from vllm_redrafter.cli.comparison import Difference, first_difference
from vllm_redrafter.cli.generation import Answer
from vllm_redrafter.cli.main import main
from vllm_redrafter.cli.verify import CHECKS, PROMPTS

COUNTERS = {"num_accepted_tokens": 3, "num_branch_acceptances": 1}


def verify(pair: tuple[str, str], *more: str) -> int:
    return main(["verify", "--target", pair[0], "--drafter", pair[1], "--max-tokens", "6", *more])


def test_equal_outputs_pass_with_a_row_per_check(fake_pair: FakePair, capsys: pytest.CaptureFixture[str]) -> None:
    status = verify(fake_pair(stats=COUNTERS))

    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert [line.rsplit("  ", 1)[-1].strip() for line in lines[1:-1]] == ["identical"] * len(CHECKS)
    assert json.loads(lines[-1]) == {
        "identical": True,
        "num_prompts": len(PROMPTS),
        "num_checks": len(CHECKS),
        "first_difference": None,
        "mean_acceptance_length": 2.5,
        # the first check runs each prompt by itself, the others run all at once
        "num_accepted_tokens": 3 * (len(PROMPTS) + len(CHECKS) - 1),
        "num_branch_acceptances": len(PROMPTS) + len(CHECKS) - 1,
    }


def test_another_token_fails_with_prompt_position_and_both_tokens_in_context(
    fake_pair: FakePair, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = fake_pair(stats=COUNTERS, with_drafter={"differs_at_temperature": 1.0, "differs_at": 4})

    status = verify(pair)

    out = capsys.readouterr().out
    difference = json.loads(out.splitlines()[-1])["first_difference"]
    assert status == 1
    assert (difference["check"], difference["prompt_index"], difference["position"]) == (CHECKS[2].name, 0, 4)
    assert (difference["expected_text"], difference["found_text"]) == ("in", "WRONG")
    assert difference["context"] == "Once upon a time,"
    assert "position 4, after 'Once upon a time,': without drafter 'in' (token 4), with drafter 'WRONG'" in out


def test_a_log_probability_outside_the_tolerance_fails(fake_pair: FakePair, capsys: pytest.CaptureFixture[str]) -> None:
    status = verify(fake_pair(stats=COUNTERS, with_drafter={"logprob_shift": 3e-3}))

    difference = json.loads(capsys.readouterr().out.splitlines()[-1])["first_difference"]
    assert status == 1
    assert (difference["check"], difference["kind"]) == (CHECKS[4].name, "logprob")


def test_rounding_of_log_probabilities_passes(fake_pair: FakePair) -> None:
    assert verify(fake_pair(stats=COUNTERS, with_drafter={"logprob_shift": 1e-3})) == 0


@pytest.mark.parametrize(
    ("stats", "note"),
    [
        ({"num_accepted_tokens": 0, "num_branch_acceptances": 0}, "no drafted token was accepted"),
        ({"num_accepted_tokens": 9, "num_branch_acceptances": 0}, "no accepted path left the best one"),
        (COUNTERS, None),
    ],
)
def test_what_was_not_exercised_is_said(
    stats: dict[str, int], note: str | None, fake_pair: FakePair, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(fake_pair(stats=stats))

    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [note in line for line in notes] == [True] if note else notes == []


def test_nothing_compared_is_no_success(fake_pair: FakePair, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(fake_pair(max_words=0)) == 1
    assert "no prompt could be run, so nothing was compared: too long" in capsys.readouterr().err


def answer(*token_ids: int, **more: Any) -> Answer:
    return Answer("", list(token_ids), 1, 1.0, **more)


def test_an_answer_that_ends_early_differs_where_it_ends() -> None:
    assert first_difference([answer(1), answer(1, 2, 3)], [answer(1), answer(1, 2)]) == Difference(
        1, 2, "token", 3, None
    )


def test_one_side_refusing_a_prompt_is_a_difference() -> None:
    refused = answer(error="too long")

    assert first_difference([answer(1)], [refused]) == Difference(0, 0, "error", None, "too long")
    assert first_difference([refused], [refused]) is None


def test_a_near_tie_for_the_last_of_the_best_tokens_is_no_difference() -> None:
    left = answer(7, logprobs=[{"7": -0.5, "8": -2.0, "9": -3.0}])

    assert first_difference([left], [answer(7, logprobs=[{"7": -0.5, "8": -2.0, "5": -3.001}])], 2e-3) is None
    assert first_difference([left], [answer(7, logprobs=[{"7": -0.5, "8": -2.0, "5": -2.9}])], 2e-3) == Difference(
        0, 0, "logprob", -3.0, -2.9
    )


@pytest.mark.parametrize(("right", "equal"), [(float("-inf"), True), (-9.0, False), (float("nan"), False)])
def test_an_impossible_token_must_be_impossible_in_both(right: float, equal: bool) -> None:
    found = first_difference([answer(7, logprobs=[{"7": float("-inf")}])], [answer(7, logprobs=[{"7": right}])], 2e-3)

    assert (found is None) == equal
