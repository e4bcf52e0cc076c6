"""Under model runner V2: targets on two ranks, with LoRA adapters, in bf16 and in int8."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import tiny_models
from tests.engine.architectures import quantize_to_int8, save_random_lora
from tests.engine.engine_process import EnginePool, Request, Workload, assert_same_answers
from tests.engine.test_numerics import assert_only_ties_differ
from tests.engine.v2.conftest import V2Pair

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "detokenize": False}
SEEDED = {**GREEDY, "temperature": 1.0, "max_tokens": 12}
LARGEST_TIE = 0.5
"""Four steps of bf16, in log-probability: the kernel of trees rounds otherwise than the stand-in for a stock one."""
TWO_RANKS = {
    # one rank per core at most, wherever the system puts it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM compiles the lookup of embeddings that are shared out, and torch would ask Triton for the stand-in's version
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_PLUGINS": "redrafter,stand_ins",
}


def workload_of(pair: V2Pair) -> Workload:
    return Workload(
        [Request(prompt, GREEDY) for prompt in pair.prompts]
        + [Request(prompt, {**SEEDED, "seed": seed}) for seed, prompt in enumerate(pair.prompts)]
    )


def test_two_ranks_draft_the_same_and_change_no_token(engines: EnginePool, v2_pair: V2Pair) -> None:
    workload = workload_of(v2_pair)
    on_two = v2_pair._replace(environment={**v2_pair.environment, **TWO_RANKS})

    drafted = engines.run(on_two.drafted(tensor_parallel_size=2), workload)

    # ranks add up in another order, which these logits do not hang on
    assert_same_answers(drafted, engines.run(v2_pair.plain(), workload))
    assert drafted.stats["num_branch_acceptances"] > 0
    assert drafted.stats["num_commits"] > 0
    assert drafted.num_head_rows == [tiny_models.VOCAB_SIZE // 2] * 2
    # what the ranks draft together is what one drafts
    alone = engines.run(v2_pair.drafted(), workload)
    assert alone.num_head_rows == [tiny_models.VOCAB_SIZE]
    assert drafted.stats["accepted_by_depth"] == alone.stats["accepted_by_depth"]


def test_requests_with_and_without_a_lora_adapter_share_a_batch(
    engines: EnginePool, v2_pair: V2Pair, tmp_path: Path
) -> None:
    # the head's share is added row by row of logits
    lora = save_random_lora(tmp_path / "lora", tiny_models.make_llama(head_dim=64), more=["lm_head"])
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    workload = Workload(
        [
            Request(prompt, {**sampling, "seed": seed}, lora=adapter)
            for seed, prompt in enumerate(v2_pair.prompts)
            for sampling in (GREEDY, SEEDED)
            for adapter in (None, lora)
        ]
    )

    drafted = engines.run(v2_pair.drafted(**options), workload)

    plain = engines.run(v2_pair.plain(**options), workload)
    assert_same_answers(drafted, plain)
    texts = plain.token_ids()
    assert all(ours != theirs for ours, theirs in zip(texts[::2], texts[1::2], strict=True)), "the adapter did nothing"
    assert drafted.stats["num_branch_acceptances"] > 0
    assert drafted.stats["num_commits"] > 0


def test_text_in_bf16_leaves_that_of_plain_vllm_only_where_two_tokens_tie(engines: EnginePool, v2_pair: V2Pair) -> None:
    workload = Workload([Request(prompt, GREEDY) for prompt in v2_pair.prompts])

    drafted = engines.run(v2_pair.drafted(dtype="bfloat16"), workload)

    assert_only_ties_differ(drafted, engines, v2_pair.plain(dtype="bfloat16"), v2_pair.prompts, LARGEST_TIE)
    assert drafted.stats["num_branch_acceptances"] > 0


def test_text_of_an_int8_target_leaves_that_of_plain_vllm_only_where_two_tokens_tie(
    engines: EnginePool, v2_pair: V2Pair, tmp_path: Path
) -> None:
    pair = v2_pair._replace(target=quantize_to_int8(Path(v2_pair.target), tmp_path / "target"))
    # in shorter texts a missing commit changes nothing
    workload = Workload([Request(prompt, {**GREEDY, "max_tokens": 48}) for prompt in pair.prompts])

    # in bf16: with AMX vLLM's own int8 kernel takes nothing else
    drafted = engines.run(pair.drafted(dtype="bfloat16"), workload)

    assert_only_ties_differ(drafted, engines, pair.plain(dtype="bfloat16"), pair.prompts, LARGEST_TIE)
    assert drafted.stats["num_branch_acceptances"] > 0
