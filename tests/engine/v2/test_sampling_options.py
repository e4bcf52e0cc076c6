"""What vLLM's kernels count row by row means for a tree what it means for text: one test per assumption of theirs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.engine_process import EnginePool, Request, Result, Workload, assert_same_answers
from tests.engine.test_random_requests import random_requests
from tests.engine.test_sampling_options import assert_same_logprobs, ids
from tests.engine.v2.conftest import V2Pair

pytestmark = pytest.mark.engine

Compare = Callable[[EnginePool, V2Pair, Workload], Result]
GREEDY = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
SEEDED = {"temperature": 1.0, "max_tokens": 10, "ignore_eos": True, "seed": 5}

LINEAR: dict[str, dict[str, Any]] = {
    "negative penalties": {**GREEDY, "repetition_penalty": 0.5, "frequency_penalty": -1.5, "presence_penalty": -2.0},
    "repetition penalty": {**GREEDY, "repetition_penalty": 1.3},
    "frequency and presence penalties, sampled": {**SEEDED, "frequency_penalty": 0.6, "presence_penalty": 0.5},
}
BRANCHING: dict[str, dict[str, Any]] = {
    "min_p": {**SEEDED, "min_p": 0.1},
    "logit_bias": {**GREEDY, "logit_bias": dict.fromkeys(ids("xyz"), 2.5)},
    "allowed_token_ids": {**GREEDY, "allowed_token_ids": ids("abcdefghijklm0123456789")},
    "min_tokens": {**GREEDY, "min_tokens": 7, "stop_token_ids": ids("abcdefghijklmnopqrstuvwxyz")},
    "stop strings": {**GREEDY, "stop": ["s", "0", "q5"]},
}
# most texts fit it, but for a dot in every eighth place: drafts pass, and the place of each one matters
DOTTED = r"([^.<]{7}\.){3}"
LOGPROBS = {
    "greedy": {**GREEDY, "logprobs": 3, "prompt_logprobs": 2},
    "sampled": {**SEEDED, "logprobs": 1},
    "of tokens named": {**GREEDY, "logprob_token_ids": ids("ax7")},
}


def options_workload(pair: V2Pair, sampling: dict[str, Any]) -> Workload:
    """Return every prompt with the same options, and with seeds of their own."""
    return Workload(
        [
            Request(prompt, {**sampling, "seed": sampling["seed"] + index} if "seed" in sampling else sampling)
            for index, prompt in enumerate(pair.prompts)
        ]
    )


def bad_bigrams(engines: EnginePool, pair: V2Pair) -> dict[str, Any]:
    """Return greedy options under which every prompt may not say two things that it would say."""
    texts = engines.run(pair.plain(), options_workload(pair, GREEDY)).texts()
    return {**GREEDY, "bad_words": [text[0][at : at + 2] for text in texts if text is not None for at in (3, 8)]}


def compared(engines: EnginePool, pair: V2Pair, workload: Workload) -> Result:
    drafted = engines.run(pair.drafted(), workload)
    assert_same_answers(drafted, engines.run(pair.plain(), workload))
    return drafted


def compared_in_turn(engines: EnginePool, pair: V2Pair, workload: Workload) -> Result:
    """Return what came of a workload while trees of all sizes, and none, took turns."""
    in_turn = replace(workload, mutation="v2.choose_another_size_at_every_step")
    drafted = engines.run(pair.drafted({"budget": "auto"}), in_turn)
    assert_same_answers(drafted, engines.run(pair.plain(), workload))
    assert drafted.stats["num_truncated_trees"] > 0
    return drafted


@pytest.mark.parametrize("name", [*LINEAR, "bad words"])
def test_an_option_that_counts_the_tokens_before_gets_a_chain(engines: EnginePool, v2_pair: V2Pair, name: str) -> None:
    sampling = bad_bigrams(engines, v2_pair) if name == "bad words" else LINEAR[name]

    drafted = compared(engines, v2_pair, options_workload(v2_pair, sampling))

    assert drafted.stats["num_accepted_tokens"] > 0
    assert drafted.stats["num_branching_trees"] == 0


def test_a_thinking_budget_ends_the_thoughts_of_a_chain(engines: EnginePool, v2_pair: V2Pair) -> None:
    config = {"reasoning_config": {"reasoning_start_str": "a", "reasoning_end_str": "xyz"}}
    workload = Workload(
        [
            Request(prompt + ids("a"), {**sampling, "thinking_token_budget": budget})
            for prompt, sampling, budget in zip(v2_pair.prompts, (GREEDY, SEEDED) * 2, (0, 3, 6, 4), strict=True)
        ]
    )

    drafted = engines.run(v2_pair.drafted(**config), workload)
    plain = engines.run(v2_pair.plain(**config), workload)

    assert_same_answers(drafted, plain)
    assert [texts is not None and texts[0].find("xyz") for texts in plain.texts()] == [0, 3, 6, 4]
    assert drafted.stats["num_accepted_tokens"] > 0
    assert drafted.stats["num_branching_trees"] == 0


@pytest.mark.parametrize("name", BRANCHING)
def test_any_other_option_is_honoured_in_trees(engines: EnginePool, v2_pair: V2Pair, name: str) -> None:
    drafted = compared(engines, v2_pair, options_workload(v2_pair, BRANCHING[name]))

    assert drafted.stats["num_accepted_tokens"] > 0
    assert drafted.stats["num_branching_trees"] > 0


def test_each_option_has_an_effect_here(engines: EnginePool, v2_pair: V2Pair) -> None:
    bare = {
        key: engines.run(v2_pair.plain(), options_workload(v2_pair, sampling)).texts()
        for key, sampling in (("greedy", GREEDY), ("seeded", SEEDED))
    }
    for name, sampling in {**LINEAR, **BRANCHING, "bad words": bad_bigrams(engines, v2_pair)}.items():
        texts = engines.run(v2_pair.plain(), options_workload(v2_pair, sampling)).texts()
        assert texts != bare["seeded" if "seed" in sampling else "greedy"], name


@pytest.mark.parametrize("name", LOGPROBS)
def test_logprobs_are_those_of_the_accepted_path(engines: EnginePool, v2_pair: V2Pair, name: str) -> None:
    workload = options_workload(v2_pair, LOGPROBS[name])

    drafted = compared(engines, v2_pair, workload)

    assert_same_logprobs(drafted, engines.run(v2_pair.plain(), workload))
    if "sampled" not in name:
        assert drafted.stats["num_branch_acceptances"] > 0


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 1}], ids=["greedy", "sampled"])
def test_structured_outputs_are_valid_and_those_of_plain_vllm(
    engines: EnginePool, v2_pair: V2Pair, sampling: dict[str, Any]
) -> None:
    grammar = {"regex": DOTTED}
    workload = Workload(
        [Request(prompt, {"max_tokens": 40, "structured_outputs": grammar, **sampling}) for prompt in v2_pair.prompts]
    )

    drafted = compared(engines, v2_pair, workload)

    texts = [texts[0] for texts in drafted.texts() if texts is not None]
    assert all(re.fullmatch(DOTTED, text) for text in texts), texts
    assert drafted.stats["num_branching_trees"] == 0
    assert drafted.stats["num_accepted_tokens"] > 0


@pytest.mark.parametrize("compare", [compared, compared_in_turn], ids=["one size", "sizes in turn"])
def test_trees_chains_and_grammars_share_a_batch(engines: EnginePool, v2_pair: V2Pair, compare: Compare) -> None:
    options = [
        GREEDY,
        LINEAR["repetition penalty"],
        {"temperature": 0, "max_tokens": 24, "structured_outputs": {"regex": DOTTED}},
        {**SEEDED, "logprobs": 2},
    ]
    workload = Workload([Request(prompt, each) for prompt, each in zip(v2_pair.prompts, options, strict=True)])

    drafted = compare(engines, v2_pair, workload)

    assert_same_logprobs(drafted, engines.run(v2_pair.plain(), workload))
    assert drafted.stats["num_branching_trees"] > 0


@pytest.mark.parametrize("compare", [compared, compared_in_turn], ids=["one size", "sizes in turn"])
def test_random_requests_get_the_answers_of_plain_vllm(engines: EnginePool, v2_pair: V2Pair, compare: Compare) -> None:
    workload = Workload(random_requests(v2_pair.prompts, seed=0, num_requests=12, lengths=(4, 9, 14)))

    drafted = compare(engines, v2_pair, workload)

    assert_same_logprobs(drafted, engines.run(v2_pair.plain(), workload))
    assert drafted.stats["num_branch_acceptances"] > 0
