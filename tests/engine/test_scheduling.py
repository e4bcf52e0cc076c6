"""What the scheduler does to requests does not show in their text: limits, chunks, preemption, aborts, padding."""

from __future__ import annotations

import pytest

from tests.engine.conftest import TinyPair
from tests.engine.engine_process import WHEN_IDLE, EnginePool, Request, Workload, assert_same_answers
from tests.engine.tiny_models import token_prompts

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_tokens": 64, "ignore_eos": True}
SEEDED = {"temperature": 1.0, "max_tokens": 64, "ignore_eos": True}


def test_max_tokens_ends_a_text_inside_an_accepted_path(engines: EnginePool, tiny_pair: TinyPair) -> None:
    workload = Workload(
        [
            Request(prompt, {**GREEDY, "max_tokens": max_tokens})
            for prompt in tiny_pair.prompts
            for max_tokens in (1, 2, 3, 4, 6, 9)
        ]
    )

    drafted = engines.run(tiny_pair.drafted(), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), workload))
    assert all(reasons == [("length", None)] for reasons in drafted.finish_reasons())
    stats = drafted.stats
    assert stats["num_emitted_tokens"] < stats["num_accepted_tokens"] + stats["num_steps"], "no path was cut"


@pytest.mark.parametrize("num_nodes", [16, 40])
def test_max_model_len_ends_a_text_inside_a_tree(engines: EnginePool, tiny_pair: TinyPair, num_nodes: int) -> None:
    max_model_len = 128
    room = (1, 2, 3, 4, 5, 6, 8, 12, 16, 17, 18, 24, 33)
    prompts = token_prompts([max_model_len - tokens for tokens in room], seed=7)
    # texts that the drafter knows come to the limit deep inside accepted paths
    prompts += [prompt for prompt in tiny_pair.prompts if max_model_len - 64 <= len(prompt) < max_model_len]
    greedy = [Request(prompt, {**GREEDY, "max_tokens": 1000}) for prompt in prompts]
    seeded = [Request(prompt, {**SEEDED, "max_tokens": 1000, "seed": 3}) for prompt in prompts]
    workload = Workload([*greedy, *seeded])
    speculation = {"budget": "fixed", "num_speculative_tokens": num_nodes, "beam_width": 10}

    drafted = engines.run(tiny_pair.drafted(speculation, max_model_len=max_model_len), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(max_model_len=max_model_len), workload))
    for request, answer in zip(workload.requests, drafted.answers, strict=True):
        assert answer is not None
        assert len(request.prompt) + len(answer["outputs"][0]["token_ids"]) == max_model_len
    assert drafted.stats["num_truncated_trees"] > 0
    assert drafted.stats["num_accepted_tokens"] > 0


def test_trees_cut_by_the_token_budget_stay_trees(engines: EnginePool, tiny_pair: TinyPair) -> None:
    speculation = {"budget": "fixed", "num_speculative_tokens": 40, "beam_width": 8, "draft_length": 5}
    workload = Workload(
        [Request(prompt, GREEDY) for prompt in tiny_pair.prompts]
        + [Request(prompt, {**SEEDED, "seed": seed}) for seed, prompt in enumerate(tiny_pair.prompts)]
    )

    drafted = engines.run(tiny_pair.drafted(speculation, max_num_batched_tokens=45), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), workload))
    assert drafted.stats["num_truncated_trees"] > 50
    assert drafted.stats["num_branch_acceptances"] > 20


@pytest.mark.parametrize("budget", ["fixed", "auto"])
def test_preempted_requests_go_on_as_if_nothing_had_happened(
    engines: EnginePool, tiny_pair: TinyPair, budget: str
) -> None:
    prompts = token_prompts([40, 61, 64, 65, 70, 90, 95, 96], seed=3)
    workload = Workload(
        [Request(prompt, {**GREEDY, "max_tokens": 96}) for prompt in prompts]
        + [Request(prompt, {**SEEDED, "max_tokens": 96, "seed": seed}) for seed, prompt in enumerate(prompts)]
    )

    drafted = engines.run(
        tiny_pair.drafted({"budget": budget}, num_gpu_blocks_override=18, max_model_len=256), workload
    )

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), workload))
    assert drafted.metrics["vllm:num_preemptions"] > 0
    if budget == "fixed":
        assert drafted.stats["num_branch_acceptances"] > 0


def test_aborted_and_late_requests_leave_the_others_alone(engines: EnginePool, tiny_pair: TinyPair) -> None:
    requests = [Request(prompt, GREEDY) for prompt in tiny_pair.prompts[:8]]
    requests[2] = Request(tiny_pair.prompts[2], GREEDY, abort_after=7)
    requests[5] = Request(tiny_pair.prompts[5], {**SEEDED, "seed": 1}, abort_after=7)
    requests.append(Request(tiny_pair.prompts[9], GREEDY, add_after=8))
    requests.append(Request(tiny_pair.prompts[10], {**SEEDED, "seed": 2}, add_after=9))
    workload = Workload(requests)

    drafted = engines.run(tiny_pair.drafted(), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), workload))
    assert [answer is None for answer in drafted.answers] == [index in (2, 5) for index in range(10)]
    assert drafted.stats["num_branch_acceptances"] > 0


def padding_workload(pair: TinyPair, sampling: dict[str, object]) -> Workload:
    """Return requests with one token to compute while others decode: vLLM pads these to the size of a draft."""
    first = [Request(prompt, {**sampling, "max_tokens": 40}) for prompt in pair.prompts[:4]]
    short = [Request(prompt, sampling, add_after=6 + index) for index, prompt in enumerate(token_prompts([1, 1, 1]))]
    blocks = token_prompts([65, 97])
    cached = [Request(prompt, {**sampling, "max_tokens": 2}) for prompt in blocks]
    resent = [Request(prompt, sampling, add_after=WHEN_IDLE) for prompt in blocks]
    return Workload([*first, *short, *cached, *resent])


@pytest.mark.parametrize("sampling", [GREEDY, {**SEEDED, "seed": 4}], ids=["greedy", "sampled"])
def test_padding_that_vllm_schedules_as_drafts_is_never_accepted(
    engines: EnginePool, tiny_pair: TinyPair, sampling: dict[str, object]
) -> None:
    workload = padding_workload(tiny_pair, sampling)

    drafted = engines.run(tiny_pair.drafted(), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(), workload))
    assert drafted.stats["num_chain_fallbacks"] > 1
