"""Under model runner V2, text with trees is that of vLLM without the plugin, and the trees were no decoration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.engine.engine_process import WHEN_IDLE, EnginePool, Request, Workload, assert_same_answers
from tests.engine.v2.conftest import NUM_NODES, V2Pair

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
SAMPLED = {"temperature": 1.0, "max_tokens": 14, "ignore_eos": True}
NARROWED = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_tokens": 12, "ignore_eos": True}


def greedy(pair: V2Pair, **more: Any) -> Workload:
    """Return prompts that end before, at and behind the end of a block, one of them longer than a chunk."""
    return Workload([Request(prompt, {**GREEDY, **more}) for prompt in pair.prompts])


def seeded(pair: V2Pair, sampling: dict[str, Any]) -> Workload:
    return Workload([Request(prompt, {**sampling, "seed": seed}) for seed, prompt in enumerate(pair.prompts)])


def resent(pair: V2Pair, engines: EnginePool) -> Workload:
    """Return the greedy prompts and, when they are answered, two of them again with more or less of their answers.

    Where all but one token of a prompt is cached, vLLM schedules drafts with it that nobody has proposed.
    """
    answers = engines.run(pair.plain(), greedy(pair)).token_ids()
    again = []
    for index, num_tokens, when in ((1, 20, WHEN_IDLE), (2, 20, WHEN_IDLE), (2, 1, 2 * WHEN_IDLE)):
        samples = answers[index]
        assert samples is not None
        prompt = [*pair.prompts[index], *samples[0][:num_tokens]]
        again.append(Request(prompt, {**GREEDY, "max_tokens": 8}, add_after=when))
    return Workload([*greedy(pair).requests, *again])


def test_greedy_text_is_that_of_plain_vllm_and_so_is_the_text_after_a_cached_prefix(
    engines: EnginePool, v2_pair: V2Pair
) -> None:
    workload = resent(v2_pair, engines)

    drafted = engines.run(v2_pair.drafted(), workload)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), workload))
    resent_answers = [answer for answer in drafted.answers[len(v2_pair.prompts) :] if answer is not None]
    # the cached blocks hold what accepted paths have left there
    assert all(answer["num_cached_tokens"] >= 32 for answer in resent_answers)


def test_trees_are_accepted_deeply_and_off_their_first_path_and_rejected(engines: EnginePool, v2_pair: V2Pair) -> None:
    stats = engines.run(v2_pair.drafted(), resent(v2_pair, engines)).stats

    assert stats["num_branching_trees"] > 10
    assert stats["num_branch_acceptances"] > 1
    assert stats["num_commits"] > 1
    assert len(stats["accepted_by_depth"]) > 1
    assert 0 < stats["num_accepted_tokens"] < stats["num_draft_tokens"]
    assert stats["num_draft_tokens"] <= NUM_NODES * stats["num_drafts"]
    assert stats["num_emitted_tokens"] > 1.3 * stats["num_steps"]


@pytest.mark.parametrize("sampling", [SAMPLED, NARROWED], ids=["T=1", "T=0.7, top_p, top_k"])
def test_seeded_text_is_that_of_plain_vllm(engines: EnginePool, v2_pair: V2Pair, sampling: dict[str, Any]) -> None:
    workload = seeded(v2_pair, sampling)

    drafted = engines.run(v2_pair.drafted(), workload)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), workload))
    assert drafted.stats["num_accepted_tokens"] > 0


def test_a_chain_has_no_branches(engines: EnginePool, v2_pair: V2Pair) -> None:
    workload = greedy(v2_pair)

    drafted = engines.run(v2_pair.drafted({"beam_width": 1, "num_speculative_tokens": 4}), workload)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), workload))
    assert drafted.stats["num_accepted_tokens"] > 0
    assert drafted.stats["num_branching_trees"] == drafted.stats["num_commits"] == 0


def test_trees_that_the_scheduler_cuts_are_trees(engines: EnginePool, v2_pair: V2Pair) -> None:
    workload = greedy(v2_pair)

    drafted = engines.run(v2_pair.drafted(max_num_batched_tokens=14), workload)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), workload))
    assert drafted.stats["num_truncated_trees"] > 0
    assert drafted.stats["num_accepted_tokens"] > 0


@pytest.mark.parametrize("is_async", [True, False])
def test_the_size_of_trees_may_follow_that_of_the_batch(engines: EnginePool, v2_pair: V2Pair, is_async: bool) -> None:
    # the longer an answer, the emptier the batch: none are drafted for four requests, small trees for two and three
    workload = Workload(
        [
            Request(prompt, {**sampling, "max_tokens": 12 + 12 * index, "seed": index})
            for sampling in (GREEDY, SAMPLED)
            for index, prompt in enumerate(v2_pair.prompts)
        ]
    )
    sizes = {"num_speculative_tokens_per_batch_size": [[1, 1, NUM_NODES], [2, 3, 6], [4, 4, 0]]}

    drafted = engines.run(v2_pair.drafted(sizes, async_scheduling=is_async), workload)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), workload))
    assert drafted.is_async == is_async
    stats, always = drafted.stats, engines.run(v2_pair.drafted(), workload).stats
    assert stats["num_truncated_trees"] > 0
    assert stats["num_accepted_tokens"] > 0
    assert stats["num_branch_acceptances"] > 0
    # of both kinds of steps there were some: with trees, and with a batch too large for them
    assert 0 < stats["num_drafts"] < always["num_drafts"]
    num_emitted = sum(request.sampling["max_tokens"] for request in workload.requests)
    assert stats["num_emitted_tokens"] < num_emitted - len(workload.requests)


@pytest.mark.parametrize("is_async", [True, False])
def test_the_size_of_trees_may_change_at_every_step(engines: EnginePool, v2_pair: V2Pair, is_async: bool) -> None:
    # and what the steps cost and bring is learnt, the mutation sees to it
    workload = Workload([*greedy(v2_pair).requests, *seeded(v2_pair, SAMPLED).requests])
    in_turn = replace(workload, mutation="v2.choose_another_size_at_every_step")

    drafted = engines.run(v2_pair.drafted({"budget": "auto"}, async_scheduling=is_async), in_turn)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), workload))
    assert drafted.is_async == is_async
    stats = drafted.stats
    # of four steps three have trees, two of them parts of trees
    assert 0.4 < stats["num_truncated_trees"] / stats["num_drafts"] < 0.8
    assert stats["num_branch_acceptances"] > 0


def test_requests_that_are_preempted_go_on_where_they_were(engines: EnginePool, v2_pair: V2Pair) -> None:
    workload = greedy(v2_pair, max_tokens=40)

    drafted = engines.run(v2_pair.drafted(max_model_len=192, num_gpu_blocks_override=8), workload)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), workload))
    assert drafted.metrics["vllm:num_preemptions"] > 0
    assert drafted.stats["num_accepted_tokens"] > 0


def test_text_ends_where_the_model_ends(engines: EnginePool, v2_pair: V2Pair) -> None:
    workload = Workload([Request(prompt, {**GREEDY, "max_tokens": None}) for prompt in v2_pair.prompts[3:]])
    short = {"max_model_len": 108}

    drafted = engines.run(v2_pair.drafted(**short), workload)

    assert_same_answers(drafted, engines.run(v2_pair.plain(**short), workload))
    assert drafted.stats["num_truncated_trees"] > 0


def test_requests_come_and_go_while_others_are_drafted_for(engines: EnginePool, v2_pair: V2Pair) -> None:
    requests = [
        Request(prompt, {**GREEDY, "max_tokens": 10 + 5 * index}, add_after=3 * index)
        for index, prompt in enumerate([*v2_pair.prompts, *v2_pair.prompts[::-1]])
    ]
    requests[2] = Request(requests[2].prompt, GREEDY, add_after=4, abort_after=5)

    drafted = engines.run(v2_pair.drafted(), Workload(requests))

    assert_same_answers(drafted, engines.run(v2_pair.plain(), Workload(requests)))


def test_the_plain_engine_knows_nothing_of_the_plugin(engines: EnginePool, v2_pair: V2Pair) -> None:
    plain = engines.run(v2_pair.plain(), greedy(v2_pair))
    drafted = engines.run(v2_pair.drafted(), resent(v2_pair, engines))

    assert (plain.has_plugin, drafted.has_plugin) == (False, True)


def test_async_scheduling_stays_on(engines: EnginePool, v2_pair: V2Pair) -> None:
    assert engines.run(v2_pair.drafted(), resent(v2_pair, engines)).is_async


def test_without_async_scheduling_the_text_is_the_same(engines: EnginePool, v2_pair: V2Pair) -> None:
    workload = seeded(v2_pair, SAMPLED)

    drafted = engines.run(v2_pair.drafted(async_scheduling=False), workload)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), workload))
    assert not drafted.is_async
    assert drafted.stats["num_accepted_tokens"] > 0
