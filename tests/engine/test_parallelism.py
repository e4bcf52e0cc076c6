"""Targets on two ranks, and targets with LoRA adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import tiny_models
from tests.engine.architectures import save_random_lora
from tests.engine.conftest import TWO_RANKS
from tests.engine.engine_process import Engine, EnginePool, Request, Workload, assert_same_answers

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "detokenize": False}
SEEDED = {**GREEDY, "temperature": 1.0}
PROMPTS = tiny_models.token_prompts([3, 31, 32, 33, 64, 65, 100, 150], seed=21)
WHOLE_PROMPTS = {"max_num_batched_tokens": 8192}


@pytest.mark.parametrize("budget", ["fixed", "auto"])
def test_two_ranks_draft_the_same_and_change_no_token(
    engines: EnginePool, tmp_path_factory: pytest.TempPathFactory, budget: str
) -> None:
    directory = tmp_path_factory.mktemp("ranks")
    # each rank holds half of the embedding and of the head, whose 70 rows vLLM pads to 128
    model = tiny_models.make_llama(num_key_value_heads=2, vocab_size=70)
    target = tiny_models.save_target(model, directory / "target")
    tied = {"tie_lm_head": True, "exit_dim": tiny_models.HIDDEN_SIZE}
    drafter = tiny_models.save_trained_drafter(model, directory / "drafter", PROMPTS[::2], num_steps=120, **tied)
    workload = Workload(
        [Request(prompt, GREEDY) for prompt in PROMPTS]
        + [Request(prompt, {**SEEDED, "seed": seed}) for seed, prompt in enumerate(PROMPTS)]
    )

    drafted = engines.run(
        Engine(target, drafter, {"budget": budget}, {"tensor_parallel_size": 2}, environment=TWO_RANKS), workload
    )

    # one rank without drafter is the reference: ranks add up in another order, which these logits do not hang on
    assert_same_answers(drafted, engines.run(Engine(target, options=WHOLE_PROMPTS), workload))
    assert drafted.stats["num_accepted_tokens"] > 0
    if budget == "fixed":
        assert drafted.stats["num_branch_acceptances"] > 0
        assert drafted.stats["num_commits"] > 0


def test_requests_with_and_without_a_lora_adapter_share_a_batch(engines: EnginePool, tmp_path: Path) -> None:
    model = tiny_models.make_llama()
    target = tiny_models.save_target(model, tmp_path / "target")
    drafter = tiny_models.save_trained_drafter(model, tmp_path / "drafter", PROMPTS[::2], num_steps=120)
    lora = save_random_lora(tmp_path / "lora", model)
    options = {
        "enable_lora": True,
        "max_lora_rank": 8,
        # on a CPU vLLM takes the last slot for requests without adapter: one must stay empty
        "max_loras": 2,
        # with LoRA vLLM wants room for the drafts of all requests in every step
        "max_num_batched_tokens": 136,
    }
    workload = Workload(
        [
            Request(prompt, {**sampling, "seed": seed}, lora=adapter)
            for seed, prompt in enumerate(PROMPTS[:4])
            for sampling in (GREEDY, SEEDED)
            for adapter in (None, lora)
        ]
    )

    drafted = engines.run(Engine(target, drafter, {"budget": "fixed"}, options), workload)

    plain = engines.run(Engine(target, options={**options, **WHOLE_PROMPTS}), workload)
    assert_same_answers(drafted, plain)
    texts = plain.token_ids()
    assert all(ours != theirs for ours, theirs in zip(texts[::2], texts[1::2], strict=True)), "the adapter did nothing"
    assert drafted.stats["num_branch_acceptances"] > 0
    assert drafted.stats["num_commits"] > 0
