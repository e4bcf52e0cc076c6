"""What is measured, in which order, and what the figures mean: with engines that only pretend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from vllm_redrafter.bench.speed import (
    STORY_PROMPTS,
    Engine,
    Outcome,
    Plan,
    Request,
    Result,
    SpeculativeConfig,
    measure,
    median_range,
    speculative_config,
    summarise,
)

PROMPTS = ("Once upon a time", "One day")


class FakeEngine:
    """Answers each request with its seed, twice; writes down what it was asked."""

    def __init__(self, name: str, log: list[tuple[Any, ...]]) -> None:
        self.name = name
        self.log = log

    def generate(self, requests: Sequence[Request], sampling: dict[str, Any]) -> Outcome:
        self.log.append((self.name, sampling["temperature"], sampling["max_tokens"], len(requests)))
        return Outcome([[request.seed or 0] * 2 for request in requests], [1] * len(requests), 0.5, {})


def starter(log: list[tuple[Any, ...]]) -> Any:
    @contextlib.contextmanager
    def start(config: SpeculativeConfig, max_num_seqs: int) -> Iterator[Engine]:
        name = "plain" if config is None else config["method"]
        log.append(("start", name, max_num_seqs))
        yield FakeEngine(name, log)
        log.append(("end", name))

    return start


def measured(plan: Plan, log: list[tuple[Any, ...]], *, together: bool = True) -> list[list[Result]]:
    configs = {name: speculative_config(name, "drafter") for name in ("plain", "ngram")}
    return list(measure(configs, PROMPTS, plan, starter(log), lambda text: None, together=together))


def outcome(seconds: float, token_ids: list[list[int]]) -> Outcome:
    return Outcome(token_ids, [max(0, len(tokens) - 1) for tokens in token_ids], seconds, {})


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("plain", None),
        (
            "ngram",
            {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
        ),
        (
            "chain3",
            {
                "method": "redrafter",
                "model": "d",
                "num_speculative_tokens": 3,
                "beam_width": 1,
                "draft_length": 3,
                "budget": "fixed",
            },
        ),
        ("tree8", {"method": "redrafter", "model": "d", "num_speculative_tokens": 8, "budget": "fixed"}),
        ("auto", {"method": "redrafter", "model": "d", "budget": "auto"}),
        ("auto16", {"method": "redrafter", "model": "d", "num_speculative_tokens": 16, "budget": "auto"}),
        ("auto-unpacked", {"method": "redrafter", "model": "d", "budget": "auto", "pack_target": False}),
        (
            "tree3-unpacked",
            {
                "method": "redrafter",
                "model": "d",
                "num_speculative_tokens": 3,
                "budget": "fixed",
                "pack_target": False,
            },
        ),
    ],
)
def test_a_name_says_how_to_speculate(name: str, config: SpeculativeConfig) -> None:
    assert speculative_config(name, "d") == config


@pytest.mark.parametrize(
    "name", ["tree", "chain", "plain4", "eagle", "tree-1", "tree8x", "ngram4-unpacked", "plain-unpacked", "auto-", ""]
)
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"no configuration '{name}': use plain, ngram"):
        speculative_config(name, "d")


@pytest.mark.parametrize("name", ["tree0", "tree64", "auto99", "chain0"])
def test_a_tree_outside_1_to_63_nodes_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must lie between 1 and 63"):
        speculative_config(name, "d")


def test_configurations_take_turns_within_every_round() -> None:
    log: list[tuple[Any, ...]] = []

    measured(Plan([1], [0.0, 1.0], num_rounds=2, max_tokens=64), log)

    warm_ups = [("plain", 0.0, 32, 1), ("plain", 1.0, 32, 1)], [("ngram", 0.0, 32, 1), ("ngram", 1.0, 32, 1)]
    a_round = [("plain", 0.0, 64, 8), ("ngram", 0.0, 64, 8), ("plain", 1.0, 64, 8), ("ngram", 1.0, 64, 8)]
    assert log == [
        ("start", "plain", 1),
        *warm_ups[0],
        ("start", "ngram", 1),
        *warm_ups[1],
        *a_round,
        *a_round,
        ("end", "ngram"),
        ("end", "plain"),
    ]


def test_engines_that_do_not_fit_together_run_one_after_another() -> None:
    log: list[tuple[Any, ...]] = []

    results = measured(Plan([4], [0.0], num_rounds=2), log, together=False)

    starts_and_ends = [entry[:2] for entry in log if entry[0] in ("start", "end")]
    assert starts_and_ends == [("start", "plain"), ("end", "plain"), ("start", "ngram"), ("end", "ngram")]
    assert [result.speedup for result in results[0]] == [1.0, 1.0]


@pytest.mark.parametrize("together", [True, False])
def test_engines_start_as_often_as_asked_each_time_for_all_rounds(together: bool) -> None:
    log: list[tuple[Any, ...]] = []

    (results,) = measured(Plan([1], [0.0], num_rounds=2, num_starts=3), log, together=together)

    assert [entry[1] for entry in log if entry[0] == "start"] == (
        ["plain", "ngram"] * 3 if together else ["plain"] * 3 + ["ngram"] * 3
    )
    assert [len(result.rounds) for result in results] == [6, 6]


def test_every_batch_size_has_engines_and_results_of_its_own() -> None:
    log: list[tuple[Any, ...]] = []

    results = measured(Plan([1, 16], [0.0, 1.0], num_rounds=1), log)

    assert [entry[2] for entry in log if entry[0] == "start"] == [1, 1, 16, 16]
    assert [[(r.config, r.batch_size, r.temperature) for r in batch] for batch in results] == [
        [("plain", 1, 0.0), ("ngram", 1, 0.0), ("plain", 1, 1.0), ("ngram", 1, 1.0)],
        [("plain", 16, 0.0), ("ngram", 16, 0.0), ("plain", 16, 1.0), ("ngram", 16, 1.0)],
    ]
    assert [batch[0].num_answers for batch in results] == [8, 32]


def test_requests_have_seeds_only_where_something_is_drawn() -> None:
    plan = Plan(num_prompts=3)

    assert plan.requests(PROMPTS, 1, 0.0) == [(PROMPTS[0], None), (PROMPTS[1], None), (PROMPTS[0], None)]
    assert plan.requests(PROMPTS, 1, 0.7) == [(PROMPTS[0], 0), (PROMPTS[1], 1), (PROMPTS[0], 2)]


def test_a_speed_up_is_the_median_of_ratios_within_rounds() -> None:
    # the machine is three times as slow in the second round, and in the third while plain runs
    plain = [outcome(1.0, [[5] * 10]), outcome(3.0, [[5] * 10]), outcome(3.0, [[5] * 10])]
    ours = [outcome(0.5, [[5] * 10]), outcome(1.5, [[5] * 10]), outcome(0.5, [[5] * 10])]

    result = summarise("tree8", 1, 0.0, ours, plain)

    assert result.speedup == pytest.approx(2.0)
    assert result.tokens_per_second == pytest.approx(20.0)
    assert result.rounds == pytest.approx([20.0, 20 / 3, 20.0])


@pytest.mark.parametrize(
    ("num_values", "outside"),
    [(1, 0), (5, 0), (6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (36, 12)],
)
def test_the_median_lies_between_the_values_of_the_sign_test(num_values: int, outside: int) -> None:
    shuffled = [float(7 * place % num_values) for place in range(num_values)]

    expected = (outside - 1.0, float(num_values - outside)) if outside else None

    assert median_range(shuffled) == expected


def test_from_six_rounds_on_it_is_said_where_the_speed_up_lies() -> None:
    plain = [outcome(1.0, [[5] * 10])] * 6
    ours = [outcome(seconds, [[5] * 10]) for seconds in (1.0, 0.5, 0.5, 0.5, 0.5, 0.25)]

    assert summarise("tree8", 1, 0.0, ours, plain).speedup_range == pytest.approx((1.0, 4.0))
    assert summarise("tree8", 1, 0.0, ours[:5], plain[:5]).speedup_range is None


def test_an_answer_that_differs_in_any_round_is_counted() -> None:
    plain = [outcome(1.0, [[1, 2, 3], [4, 5]])] * 2
    ours = [outcome(1.0, [[1, 2, 3], [4, 5]]), outcome(1.0, [[1, 2, 3], [4, 5, 6]])]

    result = summarise("tree8", 2, 0.0, ours, plain)

    assert (result.num_different, result.num_answers) == (1, 4)
    assert summarise("plain", 2, 0.0, plain, plain).num_different == 0


def test_the_token_of_the_prompts_own_step_is_not_in_tokens_per_step() -> None:
    # 9 tokens after the first in 3 steps; an answer of one token has no decode step at all
    ours = [Outcome([[5] * 10, [6]], [3, 0], 1.0, {})]

    assert summarise("tree8", 2, 0.0, ours, ours).tokens_per_step == 3.0
    only_first = [Outcome([[6]], [0], 1.0, {})]
    assert summarise("tree8", 1, 0.0, only_first, only_first).tokens_per_step is None


def test_the_time_of_a_step_is_split_by_the_drafters_timers() -> None:
    stats = {"num_engine_steps": 10, "draft_seconds": 0.1, "verify_seconds": 0.2}
    counters = {"num_steps": 12, "num_emitted_tokens": 30, "num_draft_tokens": 96}
    ours = [Outcome([[5] * 10], [9], 1.0, {**stats, **counters})] * 2

    result = summarise("tree8", 1, 0.0, ours, ours)

    assert result.step_ms == pytest.approx({"total": 100.0, "draft": 10.0, "verify": 20.0, "rest": 70.0})
    assert result.mean_acceptance_length == pytest.approx(2.5)
    assert result.nodes_per_step == pytest.approx(8.0)


def test_without_counters_the_steps_are_known_of_requests_that_run_alone() -> None:
    ours = [outcome(1.0, [[5] * 10, [6] * 10])]

    assert summarise("plain", 1, 0.0, ours, ours).step_ms == pytest.approx({"total": 50.0, "rest": 50.0})
    assert summarise("plain", 2, 0.0, ours, ours).step_ms == {}


def test_without_plain_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="the configurations tree8 lack 'plain'"):
        list(measure({"tree8": {}}, PROMPTS, Plan(), starter([]), lambda text: None))


def test_the_prompts_that_come_along_are_openings_each_different() -> None:
    lines = STORY_PROMPTS.read_text(encoding="utf-8").splitlines()

    assert len(set(lines)) == len(lines) == 64
    assert all(line == line.strip() and line for line in lines)
