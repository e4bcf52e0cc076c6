"""Every sampling option means with a drafter what it means without."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.engine.conftest import FIXED, TWO_RANKS, TinyPair
from tests.engine.engine_process import Engine, EnginePool, Request, Result, Workload, assert_same_answers
from tests.engine.tiny_models import CHARACTERS, SPECIAL_TOKENS

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_tokens": 48, "ignore_eos": True}
SEEDED = {"temperature": 1.0, "max_tokens": 48, "ignore_eos": True, "seed": 5}


def ids(characters: str) -> list[int]:
    return [len(SPECIAL_TOKENS) + CHARACTERS.index(character) for character in characters]


OPTIONS: dict[str, dict[str, Any]] = {
    "repetition penalty": {**GREEDY, "repetition_penalty": 1.3},
    "negative penalties": {**GREEDY, "frequency_penalty": -0.3, "presence_penalty": -0.4},
    "penalties, sampled": {**SEEDED, "repetition_penalty": 1.1, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    "stop ids": {**GREEDY, "stop_token_ids": ids("abc")},
    "stop ids and eos": {**SEEDED, "ignore_eos": False, "stop_token_ids": ids("x")},
    "eos": {**SEEDED, "ignore_eos": False, "max_tokens": 200},
    "stop strings": {**GREEDY, "stop": ["s", "0", "q5"]},
    "stop strings, shown": {**SEEDED, "stop": ["ab", "z", "1"], "include_stop_str_in_output": True},
    "min_tokens": {**GREEDY, "min_tokens": 20, "stop_token_ids": ids("abcdefgh")},
    "min_tokens, sampled": {**SEEDED, "min_tokens": 11, "ignore_eos": False, "stop_token_ids": ids("0123456789")},
    "allowed_token_ids": {**GREEDY, "allowed_token_ids": ids("abcdefghijklm0123456789")},
    "bad_words": {**GREEDY, "bad_words": ["a", "s8", "w", "0"]},
    "bad_words, sampled": {**SEEDED, "bad_words": ["ab", "c", "9"]},
    "logit_bias": {**GREEDY, "logit_bias": dict.fromkeys(ids("xyz"), 2.5)},
    "logit_bias, sampled": {**SEEDED, "logit_bias": dict.fromkeys(ids("abcdefgh"), -5.0)},
    "min_p": {**SEEDED, "min_p": 0.1},
    "top_k": {**SEEDED, "top_k": 3},
    "top_p": {**SEEDED, "top_p": 0.6, "temperature": 1.3},
    "repetition_detection": {
        **GREEDY,
        "frequency_penalty": -0.5,
        "repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 3},
    },
    "three samples": {**SEEDED, "n": 3},
    "text left out": {**GREEDY, "detokenize": False},
}
LOGPROBS = {
    "greedy": {**GREEDY, "logprobs": 5, "prompt_logprobs": 3},
    "sampled": {**SEEDED, "logprobs": 2},
    "chosen token only": {**SEEDED, "logprobs": 0, "repetition_penalty": 1.1},
    "of tokens named": {**GREEDY, "logprob_token_ids": ids("ax7")},
    "flat": {**SEEDED, "logprobs": 3, "flat_logprobs": True},
}


def options_workload(pair: TinyPair, sampling: dict[str, Any]) -> Workload:
    """Return every prompt with the same options, and with seeds of their own."""
    return Workload(
        [
            Request(prompt, {**sampling, "seed": sampling["seed"] + index} if "seed" in sampling else sampling)
            for index, prompt in enumerate(pair.prompts)
        ]
    )


def mixed_workload(pair: TinyPair) -> Workload:
    """Return requests of which no two neighbours have the same options."""
    options = [*OPTIONS.values(), *LOGPROBS.values()]
    return Workload(
        [Request(pair.prompts[index % len(pair.prompts)], sampling) for index, sampling in enumerate(options)]
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_the_text_as_it_does_in_plain_vllm(
    engines: EnginePool, tiny_pair: TinyPair, name: str
) -> None:
    workload = options_workload(tiny_pair, OPTIONS[name])

    drafted = engines.run(tiny_pair.drafted(), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), workload))
    assert drafted.stats["num_accepted_tokens"] > 0
    assert drafted.stats["num_branch_acceptances"] > 0


def test_each_option_has_an_effect_here(engines: EnginePool, tiny_pair: TinyPair) -> None:
    bare = {
        key: engines.run(tiny_pair.plain(), options_workload(tiny_pair, sampling)).texts()
        for key, sampling in (("greedy", GREEDY), ("seeded", SEEDED))
    }
    for name, sampling in OPTIONS.items():
        texts = engines.run(tiny_pair.plain(), options_workload(tiny_pair, sampling)).texts()
        assert texts != bare["seeded" if "seed" in sampling else "greedy"], name


def test_requests_with_different_options_share_a_batch(engines: EnginePool, tiny_pair: TinyPair) -> None:
    workload = mixed_workload(tiny_pair)

    drafted = engines.run(tiny_pair.drafted(), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), workload))
    assert drafted.stats["num_branch_acceptances"] > 0


@pytest.mark.parametrize("name", LOGPROBS)
def test_logprobs_and_prompt_logprobs_are_those_of_plain_vllm(
    engines: EnginePool, tiny_pair: TinyPair, name: str
) -> None:
    workload = options_workload(tiny_pair, LOGPROBS[name])

    drafted = engines.run(tiny_pair.drafted(), workload)
    plain = engines.run(tiny_pair.plain(), workload)

    assert_same_answers(drafted, plain)
    assert_same_logprobs(drafted, plain)
    assert drafted.stats["num_branch_acceptances"] > 0


THINKING = {"reasoning_config": {"reasoning_start_str": "a", "reasoning_end_str": "xyz"}}
# every request has one: where one without takes the place of one that has ended, plain vLLM keeps forcing its end
THINKING_BUDGETS = (0, 1, 4, 9, 40, 6, 2, 13)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "sampled"])
def test_a_thinking_budget_ends_the_thoughts_of_its_request_where_plain_vllm_ends_them(
    engines: EnginePool, tiny_pair: TinyPair, sampling: dict[str, Any]
) -> None:
    # in every other prompt the thinking has begun
    workload = Workload(
        [
            Request(
                prompt + ids("a") * (index % 2),
                {**sampling, "thinking_token_budget": THINKING_BUDGETS[index % len(THINKING_BUDGETS)]},
            )
            for index, prompt in enumerate(tiny_pair.prompts)
        ]
    )

    drafted = engines.run(tiny_pair.drafted(**THINKING), workload)
    plain = engines.run(tiny_pair.plain(**THINKING), workload)

    assert_same_answers(drafted, plain)
    cut = [texts is not None and "xyz" in texts[0] for texts in plain.texts()]
    assert sum(cut) > 2, "thoughts were cut"
    assert drafted.stats["num_branch_acceptances"] > 0


def assert_same_logprobs(drafted: Result, plain: Result) -> None:
    for ours, theirs in zip(drafted.answers, plain.answers, strict=True):
        assert ours is not None
        assert theirs is not None
        pairs = [(ours["prompt_logprobs"], theirs["prompt_logprobs"])]
        pairs += [
            (sample["logprobs"], expected["logprobs"])
            for sample, expected in zip(ours["outputs"], theirs["outputs"], strict=True)
        ]
        for positions, expected_positions in pairs:
            assert (positions is None) == (expected_positions is None)
            for entries, expected in zip(positions or [], expected_positions or [], strict=True):
                # fp32 sums in another order: batches of other sizes, attention over a path instead of a row
                assert entries == (expected and pytest.approx(expected, abs=2e-3))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{3,8}$"},
        "kind": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 10, "maximum": 99},
    },
    "required": ["name", "kind", "count"],
    "additionalProperties": False,
}
# most texts fit it, but for a dot in every eighth place: drafts pass, and the place of each one matters
DOTTED = r"([^.<]{7}\.){8}"
REGEX = r"([a-f]{2}|[x-z]{3})(-[0-9]{4}){1,5}\."
CHOICES = ["alpha", "alphabet", "beta", "gamma"]
GRAMMARS: dict[str, dict[str, Any]] = {
    "regex": {"regex": REGEX},
    "dotted": {"regex": DOTTED},
    "json": {"json": SCHEMA},
    "choice": {"choice": CHOICES},
}


def grammar_workload(pair: TinyPair, name: str, **sampling: Any) -> Workload:
    options = {"max_tokens": 96, "structured_outputs": GRAMMARS[name], **sampling}
    return Workload([Request(prompt, options) for prompt in pair.prompts])


def is_valid(name: str, text: str) -> bool:
    if name in ("regex", "dotted"):
        return re.fullmatch(REGEX if name == "regex" else DOTTED, text) is not None
    if name == "choice":
        return text in CHOICES
    value = json.loads(text)
    return (
        re.fullmatch("[a-z]{3,8}", value["name"]) is not None
        and value["kind"] in ("red", "green", "blue")
        and 10 <= value["count"] <= 99
    )


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 1}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", GRAMMARS)
def test_structured_outputs_are_valid_and_those_of_plain_vllm(
    engines: EnginePool, tiny_pair: TinyPair, name: str, sampling: dict[str, Any]
) -> None:
    workload = grammar_workload(tiny_pair, name, **sampling)

    drafted = engines.run(tiny_pair.drafted(), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), workload))
    for texts in drafted.texts():
        assert texts is not None
        assert is_valid(name, texts[0]), texts[0]
    assert drafted.stats["num_linear_drafts"] > 0
    assert drafted.stats["num_branching_trees"] == 0
    if name == "dotted":
        assert drafted.stats["num_accepted_tokens"] > 0


def test_trees_and_grammars_share_a_batch(engines: EnginePool, tiny_pair: TinyPair) -> None:
    options = [GREEDY, {"temperature": 0, "max_tokens": 96, "structured_outputs": GRAMMARS["regex"]}, SEEDED]
    workload = Workload(
        [Request(prompt, options[index % len(options)]) for index, prompt in enumerate(tiny_pair.prompts)]
    )

    drafted = engines.run(tiny_pair.drafted(), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), workload))
    assert drafted.stats["num_linear_drafts"] > 0
    assert drafted.stats["num_branch_acceptances"] > 0


def test_options_and_grammars_mean_the_same_on_two_ranks(engines: EnginePool, tiny_pair: TinyPair) -> None:
    grammars = [grammar_workload(tiny_pair, name, temperature=0).requests[0] for name in GRAMMARS]
    workload = Workload([*mixed_workload(tiny_pair).requests, *grammars])

    drafted = engines.run(
        Engine(tiny_pair.target, tiny_pair.drafter, FIXED, {"tensor_parallel_size": 2}, environment=TWO_RANKS), workload
    )

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), workload))
    assert drafted.stats["num_linear_drafts"] > 0
    assert drafted.stats["num_branch_acceptances"] > 0
