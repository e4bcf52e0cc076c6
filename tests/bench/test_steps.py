"""What a step's time is made of: with engines that only pretend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from vllm_redrafter.bench.speed import SpeculativeConfig, speculative_config
from vllm_redrafter.bench.steps import Engine, Plan, Run, StepCost, measure, sizes_that_pay

PREFILL_SECONDS = 5.0


class FakeEngine:
    """Takes 20 ms per step alone, or 30 ms for three tokens at once, of which 6 ms are drafting."""

    def __init__(self, drafts: bool, log: list[Any]) -> None:
        self.drafts = drafts
        self.log = log

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Run:
        self.log.append([tuple(prompt) for prompt in prompts])
        steps = (max_tokens - 1) // 3 if self.drafts else max_tokens - 1
        seconds = PREFILL_SECONDS + steps * (0.03 if self.drafts else 0.02)
        # the others have ended before the last
        num_steps = [steps, *[steps // 2] * (len(prompts) - 1)]
        stats = {"draft_seconds": 0.006 * steps, "num_steps": 9} if self.drafts else {}
        return Run(seconds, num_steps, max_tokens * len(prompts), stats)


def costs(plan: Plan, log: list[Any], tokens: Sequence[int] = range(10)) -> list[list[StepCost]]:
    @contextlib.contextmanager
    def start(config: SpeculativeConfig, max_num_seqs: int) -> Iterator[Engine]:
        log.append(max_num_seqs)
        yield FakeEngine(config is not None, log)

    configs = {name: speculative_config(name, "drafter") for name in ("tree8", "plain")}
    return list(measure(configs, tokens, plan, start, lambda text: None))


def test_a_step_is_what_long_answers_take_more_than_short_ones() -> None:
    ((plain,), (tree,)) = costs(Plan((1,), (4,), max_tokens=31, num_rounds=2), [])

    assert (plain.config, plain.batch_size, plain.context) == ("plain", 1, 4)
    assert plain.step_ms == pytest.approx(20)
    assert plain.ratio == 1
    assert plain.parts_ms == {}
    assert tree.step_ms == pytest.approx(30)
    assert tree.ratio == pytest.approx(1.5)
    assert tree.tokens_per_step == pytest.approx(3)
    assert tree.parts_ms == {"draft": pytest.approx(6)}


def test_every_load_and_context_is_measured_with_prompts_of_their_own() -> None:
    log: list[Any] = []

    found = costs(Plan((1, 2), (4, 12), max_tokens=4, num_rounds=1), log)

    assert [[(cost.config, cost.batch_size, cost.context) for cost in of_one] for of_one in found] == [
        [(name, 1, 4), (name, 1, 12), (name, 2, 4), (name, 2, 12)] for name in ("plain", "tree8")
    ]
    assert [entry for entry in log if isinstance(entry, int)] == [2, 2], "an engine starts once, for the largest load"
    prompts = [entry for entry in log if isinstance(entry, list) and len(entry) == 2]
    # the text comes again where it is too short
    assert prompts[0] == [(0, 1, 2, 3), (2, 3, 4, 5)]
    assert prompts[3] == [(*range(10), 0, 1), (*range(6, 10), *range(8))]


def cost(config: str, batch_size: int, ratio: float, tokens_per_step: float, context: int = 1024) -> StepCost:
    return StepCost(config, batch_size, context, 1.0, ratio, tokens_per_step, {})


def test_every_batch_size_gets_the_trees_that_pay_there_and_a_size_between_what_pays_for_the_larger() -> None:
    configs = {name: speculative_config(name, "drafter") for name in ("plain", "chain4", "tree4", "tree16")}
    measured = {1: (1.1, 1.2), 4: (1.2, 1.4), 16: (1.5, 2.1), 64: (2.6, 4.0)}
    costs = [
        cost(*row)
        for batch_size, (small, large) in measured.items()
        for row in (
            ("plain", batch_size, 1.0, 1.0),
            # a chain may be the best, but an engine drafts in one shape
            ("chain4", batch_size, 0.1, 2.0),
            ("tree4", batch_size, small, 2.4),
            ("tree16", batch_size, large, 3.0),
        )
    ]

    assert sizes_that_pay(costs, configs) == [(1, 4, 16), (5, 16, 4), (17, 64, 0)]


def test_of_several_contexts_the_median_gain_counts() -> None:
    configs = {name: speculative_config(name, "drafter") for name in ("plain", "tree8")}
    ratios = {1024: 1.5, 8192: 1.9, 32768: 9.0}
    costs = [cost("tree8", 2, ratio, 2.0, context) for context, ratio in ratios.items()]
    costs += [cost("plain", 2, 1.0, 1.0, context) for context in ratios]

    assert sizes_that_pay(costs, configs) == [(1, 2, 8)]


def test_without_the_target_alone_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="the configurations tree8 lack 'plain'"):
        next(measure({"tree8": speculative_config("tree8", "d")}, [1], Plan(), lambda *_: None, print))  # type: ignore[arg-type]


def test_without_text_there_are_no_prompts() -> None:
    with pytest.raises(ValueError, match="there is no text to cut prompts from"):
        costs(Plan((1,), (4,)), [], tokens=[])
