"""Number formats, kernels and compilation: what plain vLLM does with them, it does with a drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.architectures import quantize_to_awq, quantize_to_gptq, quantize_to_int8
from tests.engine.conftest import FIXED, TinyPair
from tests.engine.engine_process import Engine, EnginePool, Request, Result, Workload, assert_same_answers

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_tokens": 48, "ignore_eos": True}
SEEDED = {**GREEDY, "temperature": 1.0}
LARGEST_TIE = 0.25
"""Two steps of bf16 between logits of 16 to 32, in log-probability; where a commit is missing it is three and more."""


def workload_of(pair: TinyPair) -> Workload:
    return Workload(
        [Request(prompt, GREEDY) for prompt in pair.prompts]
        + [Request(prompt, {**SEEDED, "seed": seed}) for seed, prompt in enumerate(pair.prompts)]
    )


def greedy(pair: TinyPair) -> Workload:
    return Workload([Request(prompt, GREEDY) for prompt in pair.prompts])


needs_avx512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM has this on CPUs with AVX-512 only"
)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"kv_cache_dtype": "fp8"}, id="fp8 KV cache", marks=needs_avx512),
        pytest.param({"kv_cache_dtype": "fp8_e5m2"}, id="fp8 KV cache with 5 bits of exponent", marks=needs_avx512),
        pytest.param({"block_size": 128}, id="blocks of 128"),
    ],
)
def test_text_is_that_of_plain_vllm(engines: EnginePool, tiny_pair: TinyPair, options: dict[str, Any]) -> None:
    workload = workload_of(tiny_pair)

    drafted = engines.run(tiny_pair.drafted(**options), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(**options), workload))
    assert_trees_were_accepted(drafted)


def test_text_is_that_of_plain_vllm_when_both_are_compiled(engines: EnginePool, tiny_pair: TinyPair) -> None:
    workload = workload_of(tiny_pair)

    drafted = engines.run(tiny_pair.drafted(enforce_eager=None), workload)

    assert_same_answers(drafted, engines.run(tiny_pair.plain(enforce_eager=None), workload))
    assert_trees_were_accepted(drafted)


@pytest.mark.parametrize("options", [{}, {"enforce_eager": None}], ids=["eager", "compiled"])
def test_text_is_that_of_plain_vllm_with_packed_matrices(
    engines: EnginePool, tiny_pair: TinyPair, options: dict[str, Any]
) -> None:
    workload = workload_of(tiny_pair)
    plain = engines.run(tiny_pair.plain(**options), workload)
    packed = tiny_pair.drafted({**FIXED, "pack_target": True}, **options)

    drafted = engines.run(packed, workload)

    assert_same_answers(drafted, plain)
    assert_trees_were_accepted(drafted)
    broken = engines.run(packed, replace(workload, mutation="swap_rows_of_packed_products"))
    with pytest.raises(AssertionError, match="differs"):
        assert_same_answers(broken, plain)


def test_text_is_that_of_plain_vllm_when_trees_are_served_in_rounds_and_both_are_compiled(
    engines: EnginePool, tiny_pair: TinyPair
) -> None:
    workload = workload_of(tiny_pair)

    drafted = engines.run(tiny_pair.drafted(enforce_eager=None), replace(workload, mutation="serve_trees_in_rounds"))

    assert_same_answers(drafted, engines.run(tiny_pair.plain(enforce_eager=None), workload))
    assert_trees_were_accepted(drafted)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "enforce_eager": None},
        {"dtype": "float16"},
        pytest.param({"dtype": "bfloat16", "kv_cache_dtype": "fp8"}, marks=needs_avx512),
    ],
    ids=str,
)
def test_text_in_16_bits_leaves_that_of_plain_vllm_only_where_two_tokens_tie(
    engines: EnginePool, tiny_pair: TinyPair, options: dict[str, Any]
) -> None:
    drafted = engines.run(tiny_pair.drafted(**options), greedy(tiny_pair))

    assert_only_ties_differ(drafted, engines, tiny_pair.plain(**options), tiny_pair.prompts)
    assert_trees_were_accepted(drafted)


@pytest.mark.parametrize("mutation", ["drop_the_commit", "leave_positions_linear"])
def test_what_is_broken_shows_in_16_bits_too(engines: EnginePool, tiny_pair: TinyPair, mutation: str) -> None:
    options = {"dtype": "bfloat16"}

    broken = engines.run(tiny_pair.drafted(**options), replace(greedy(tiny_pair), mutation=mutation))

    with pytest.raises(AssertionError, match="plain vLLM takes other tokens"):
        assert_only_ties_differ(broken, engines, tiny_pair.plain(**options), tiny_pair.prompts)


@pytest.mark.parametrize(
    "quantize",
    [
        pytest.param(quantize_to_int8, id="int8"),
        pytest.param(quantize_to_gptq, id="GPTQ", marks=needs_avx512),
        pytest.param(quantize_to_awq, id="AWQ", marks=needs_avx512),
    ],
)
def test_text_of_a_quantised_target_leaves_that_of_plain_vllm_only_where_two_tokens_tie(
    engines: EnginePool, tiny_pair: TinyPair, tmp_path: Path, quantize: Callable[[Path, Path], str]
) -> None:
    # the drafter has learnt what the original says
    pair = tiny_pair._replace(target=quantize(Path(tiny_pair.target), tmp_path / "target"))

    # in bf16: with AMX vLLM's own int8 kernel takes nothing else
    drafted = engines.run(pair.drafted(dtype="bfloat16"), greedy(pair))

    # activations of int8 are rounded to 8 bits: a last digit may turn one of them
    assert_only_ties_differ(drafted, engines, pair.plain(dtype="bfloat16"), pair.prompts)
    assert_trees_were_accepted(drafted)


def assert_trees_were_accepted(drafted: Result) -> None:
    assert drafted.stats["num_branch_acceptances"] > 0
    assert drafted.stats["num_commits"] > 0


def assert_only_ties_differ(
    drafted: Result,
    engines: EnginePool,
    plain: Engine,
    prompts: Sequence[Sequence[int]],
    largest_tie: float = LARGEST_TIE,
) -> None:
    """Have plain vLLM read the greedy texts: there is no token of which it would not nearly have taken each itself."""
    texts = [tokens for answer in drafted.token_ids() if answer is not None for tokens in answer]
    reading = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 1}
    read = engines.run(
        plain, [Request([*prompt, *tokens], reading) for prompt, tokens in zip(prompts, texts, strict=True)]
    )
    for index, (answer, tokens) in enumerate(zip(read.answers, texts, strict=True)):
        assert answer is not None
        ranks = answer["prompt_logprobs"][-len(tokens) :]
        gaps = [max(rank.values()) - rank[str(token)] for rank, token in zip(ranks, tokens, strict=True)]
        assert max(gaps) <= largest_tie, f"request {index}: plain vLLM takes other tokens, by {gaps}"
