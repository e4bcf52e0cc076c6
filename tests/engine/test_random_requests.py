"""Whatever is asked for together, however it is scheduled: random requests, on engines unlike each other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from tests.engine.conftest import TinyPair
from tests.engine.engine_process import EnginePool, Request, Workload, assert_same_answers
from tests.engine.test_sampling_options import GRAMMARS, assert_same_logprobs, ids
from tests.engine.tiny_models import token_prompts

pytestmark = pytest.mark.engine

LONGEST_PROMPT = 140

SPECULATIONS: list[dict[str, Any]] = [
    {"budget": "fixed"},
    {"num_speculative_tokens": 16},
    {"num_speculative_tokens": 40, "beam_width": 6, "budget": "fixed"},
    {"num_speculative_tokens": 5, "beam_width": 1, "budget": "fixed"},
]
SCHEDULES: list[dict[str, Any]] = [
    {"max_num_batched_tokens": 48, "max_num_seqs": 3},
    # few blocks: requests are preempted
    {"max_num_batched_tokens": 96, "num_gpu_blocks_override": 20, "max_model_len": 256},
    {"max_num_batched_tokens": 64, "max_num_seqs": 12, "max_model_len": 160, "enable_prefix_caching": False},
    {"max_num_batched_tokens": 256, "max_num_seqs": 6, "num_gpu_blocks_override": 16, "max_model_len": 256},
]
# by their share of requests, each drawn by itself
OPTIONS: list[tuple[float, dict[str, Any]]] = [
    (0.2, {"top_p": 0.6}),
    (0.2, {"top_k": 3}),
    (0.2, {"min_p": 0.1}),
    (0.15, {"presence_penalty": 0.8}),
    (0.15, {"frequency_penalty": -0.4}),
    (0.15, {"repetition_penalty": 1.2}),
    (0.2, {"logit_bias": dict.fromkeys(ids("xyz"), 2.5)}),
    (0.1, {"allowed_token_ids": ids("abcdefghijklm0123456789")}),
    (0.15, {"bad_words": ["ab", "c", "9"]}),
    (0.2, {"min_tokens": 4}),
    (0.15, {"stop_token_ids": ids("q7")}),
    (0.2, {"stop": ["s", "0a", "z5"]}),
    (0.1, {"include_stop_str_in_output": True}),
    (0.3, {"ignore_eos": True}),
    (0.2, {"logprobs": 3}),
    (0.1, {"logprobs": 0, "prompt_logprobs": 2}),
]


def random_requests(
    prompts: Sequence[list[int]], seed: int, num_requests: int, lengths: Sequence[int]
) -> list[Request]:
    """Return requests for at most so many tokens, handed in one after another."""
    draw = random.Random(seed)
    requests = []
    for number in range(num_requests):
        sampling: dict[str, Any] = {"max_tokens": draw.choice(lengths)}
        if draw.random() < 0.5:
            sampling |= {"temperature": 0}
        else:
            sampling |= {"temperature": draw.choice([0.4, 1.0, 1.5]), "seed": number, "n": draw.choice([1, 1, 1, 3])}
        for share, option in OPTIONS:
            if draw.random() < share:
                sampling |= option
        if draw.random() < 0.1:
            sampling |= {"structured_outputs": GRAMMARS[draw.choice(list(GRAMMARS))], "min_tokens": 0}
        # every other one begins with what another has left in the cache
        beginning = draw.choice(prompts)[:64] * draw.randrange(2)
        prompt = [*beginning, *draw.choice(prompts)][:LONGEST_PROMPT]
        requests.append(Request(prompt, sampling, add_after=draw.randrange(3 * num_requests)))
    return requests


@pytest.mark.parametrize("seed", range(len(SPECULATIONS)))
def test_random_requests_get_the_answers_of_plain_vllm(engines: EnginePool, tiny_pair: TinyPair, seed: int) -> None:
    prompts = [*tiny_pair.prompts, *token_prompts([1, 33, 64, 130], seed=seed)]
    workload = Workload(random_requests(prompts, seed, num_requests=60, lengths=(5, 17, 40, 64)))
    schedule = SCHEDULES[seed]

    drafted = engines.run(tiny_pair.drafted(SPECULATIONS[seed], **schedule), workload)
    whole_prompts = {name: value for name, value in schedule.items() if name != "max_num_batched_tokens"}
    plain = engines.run(tiny_pair.plain(**whole_prompts), workload)

    assert_same_answers(drafted, plain)
    assert_same_logprobs(drafted, plain)
    assert drafted.stats["num_accepted_tokens"] > 0
    assert drafted.stats["num_linear_drafts"] > 0
    if SPECULATIONS[seed].get("beam_width") != 1:
        assert drafted.stats["num_branch_acceptances"] > 0
    if "num_gpu_blocks_override" in schedule:
        assert drafted.metrics["vllm:num_preemptions"] > 0
