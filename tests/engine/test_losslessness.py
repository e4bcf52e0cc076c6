"""Text with a drafter is that of vLLM without the plugin, whatever is drafted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.engine.conftest import TinyPair
from tests.engine.engine_process import WHEN_IDLE, Engine, EnginePool, Request, Result, Workload, assert_same_answers

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_tokens": 64, "ignore_eos": True}
PENALISED = {**GREEDY, "repetition_penalty": 1.15, "frequency_penalty": 0.3, "presence_penalty": 0.2}
SAMPLED = {"temperature": 1.0, "max_tokens": 48, "ignore_eos": True}
NARROWED = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_tokens": 48, "ignore_eos": True}

DRAFTED: dict[str, Callable[[TinyPair], Engine]] = {
    "16 nodes": lambda pair: pair.drafted(),
    "16 useless nodes": lambda pair: pair.drafted(drafter=pair.random_drafter),
    "chain": lambda pair: pair.drafted({"budget": "fixed", "beam_width": 1}),
    "1 node": lambda pair: pair.drafted({"budget": "fixed", "num_speculative_tokens": 1}),
    "3 nodes": lambda pair: pair.drafted({"budget": "fixed", "num_speculative_tokens": 3}),
    "63 nodes": lambda pair: pair.drafted(
        {"budget": "fixed", "num_speculative_tokens": 63, "beam_width": 8, "draft_length": 8}
    ),
    "automatic budget": lambda pair: pair.drafted({"budget": "auto"}),
    # as `vllm serve` and `LLM` run by default
    "automatic budget, engine in a process of its own": lambda pair: replace(
        pair.drafted({"budget": "auto"}), environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    ),
}


def greedy(pair: TinyPair) -> Workload:
    """Return prompts of 3 to 300 tokens, of which some fill a block of 32 exactly."""
    return Workload([Request(prompt, GREEDY) for prompt in pair.prompts])


def seeded(pair: TinyPair, sampling: dict[str, object]) -> Workload:
    return Workload([Request(prompt, {**sampling, "seed": seed}) for seed, prompt in enumerate(pair.prompts)])


def resent(pair: TinyPair, answers: Result) -> Workload:
    """Return the greedy prompts and, when they are answered, each again with two thirds of its answer."""
    tokens = answers.token_ids()
    again = []
    for prompt, samples in zip(pair.prompts, tokens, strict=True):
        assert samples is not None
        again.append(Request([*prompt, *samples[0][: 2 * len(samples[0]) // 3]], GREEDY, add_after=WHEN_IDLE))
    return Workload([*greedy(pair).requests, *again])


@pytest.mark.parametrize("name", DRAFTED, scope="module")
def test_greedy_text_is_that_of_plain_vllm_and_so_is_the_text_after_a_cached_prefix(
    engines: EnginePool, tiny_pair: TinyPair, name: str
) -> None:
    workload = resent(tiny_pair, engines.run(tiny_pair.plain(), greedy(tiny_pair)))

    drafted = engines.run(DRAFTED[name](tiny_pair), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), workload))
    resent_answers = drafted.answers[len(tiny_pair.prompts) :]
    hits = [answer["num_cached_tokens"] for answer in resent_answers if answer is not None]
    # blocks beyond the prompt were filled by accepted paths
    assert sum(hit > len(prompt) for hit, prompt in zip(hits, tiny_pair.prompts, strict=True)) > 8
    assert drafted.stats["num_accepted_tokens"] > 0


@pytest.mark.parametrize("sampling", [SAMPLED, NARROWED], ids=["T=1", "T=0.7, top_p, top_k"])
@pytest.mark.parametrize("name", ["16 nodes", "63 nodes", "chain", "automatic budget"], scope="module")
def test_seeded_text_is_that_of_plain_vllm_although_prompts_come_in_chunks(
    engines: EnginePool, tiny_pair: TinyPair, name: str, sampling: dict[str, object]
) -> None:
    workload = seeded(tiny_pair, sampling)

    drafted = engines.run(DRAFTED[name](tiny_pair), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), workload))
    # on a slow machine the automatic budget may find that samples, which are hard to guess, are not worth a draft
    if name != "automatic budget":
        assert drafted.stats["num_accepted_tokens"] > 0


def test_requests_without_seeds_are_drawn_as_if_each_had_one(engines: EnginePool, tiny_pair: TinyPair) -> None:
    # numbers skipped because trees were built from them would be a selection, and text without seeds biased
    workload = Workload(
        [Request(prompt, SAMPLED) for prompt in tiny_pair.prompts],
        mutation="number_the_generators_of_requests_without_seeds",
    )

    drafted = engines.run(DRAFTED["16 nodes"](tiny_pair), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), seeded(tiny_pair, SAMPLED)))
    assert drafted.stats["num_branch_acceptances"] > 0


@pytest.mark.parametrize("name", ["16 nodes", "63 nodes"], scope="module")
def test_penalised_text_is_that_of_plain_vllm(engines: EnginePool, tiny_pair: TinyPair, name: str) -> None:
    workload = Workload([Request(prompt, PENALISED) for prompt in tiny_pair.prompts])

    drafted = engines.run(DRAFTED[name](tiny_pair), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), workload))
    assert drafted.stats["num_branch_acceptances"] > 0


def test_the_plain_engine_knows_nothing_of_the_plugin(engines: EnginePool, tiny_pair: TinyPair) -> None:
    assert not engines.run(tiny_pair.plain(), greedy(tiny_pair)).has_plugin
    assert engines.run(DRAFTED["16 nodes"](tiny_pair), seeded(tiny_pair, SAMPLED)).has_plugin


def test_trees_are_accepted_deeply_and_off_their_first_path(engines: EnginePool, tiny_pair: TinyPair) -> None:
    plain = engines.run(tiny_pair.plain(), greedy(tiny_pair))

    stats = engines.run(DRAFTED["16 nodes"](tiny_pair), resent(tiny_pair, plain)).stats

    assert stats["num_branching_trees"] > 100
    assert stats["num_branch_acceptances"] > 20
    assert stats["num_commits"] > 20
    assert len(stats["accepted_by_depth"]) == 4
    assert stats["accepted_by_depth"][1] > 100
    assert stats["num_emitted_tokens"] > 2 * stats["num_steps"]


def test_a_chain_has_no_branches(engines: EnginePool, tiny_pair: TinyPair) -> None:
    stats = engines.run(DRAFTED["chain"](tiny_pair), seeded(tiny_pair, SAMPLED)).stats

    assert stats["num_accepted_tokens"] > 0
    assert stats["num_branching_trees"] == stats["num_branch_acceptances"] == stats["num_commits"] == 0


def test_no_more_nodes_are_verified_than_asked_for(engines: EnginePool, tiny_pair: TinyPair) -> None:
    for name, most in (("1 node", 1), ("3 nodes", 3), ("16 nodes", 16), ("63 nodes", 63)):
        plain = engines.run(tiny_pair.plain(), greedy(tiny_pair))
        stats = engines.run(DRAFTED[name](tiny_pair), resent(tiny_pair, plain)).stats
        assert 0.9 * most < stats["num_draft_tokens"] / stats["num_drafts"] <= most
