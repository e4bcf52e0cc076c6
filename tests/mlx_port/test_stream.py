from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import GenerationResponse
from mlx_lm.generate import stream_generate as stock_stream_generate
from mlx_lm.models.cache import make_prompt_cache

import mlx_port
from mlx_port.pair import Pair
from mlx_port.stream import Response, stream_generate
from mlx_port.telemetry import Telemetry
from tests.mlx_port.tiny_models import alone
from tests.mlx_port.twins import EXAMPLE

PROMPTS = (EXAMPLE / "prompts.txt").read_text(encoding="utf-8").splitlines()
NUM_TOKENS = 32


@cache
def make_pair() -> Pair:
    """Return the example pair; in float32, as bfloat16 has ties that a sum in another order breaks otherwise."""
    pair = mlx_port.load(str(EXAMPLE / "target"), str(EXAMPLE / "drafter"))
    pair.target.model.set_dtype(mx.float32)
    pair.drafter.set_dtype(mx.float32)
    return pair


def _ours(prompt: str, pair: Pair | None = None, **options: Any) -> list[Response]:
    target, tokenizer, drafter = pair or make_pair()
    return list(stream_generate(target, tokenizer, prompt, drafter, max_tokens=NUM_TOKENS, **options))


def _theirs(prompt: str) -> list[GenerationResponse]:
    pair = make_pair()
    return list(stock_stream_generate(pair.target.model, pair.tokenizer, prompt, max_tokens=NUM_TOKENS))


@pytest.mark.parametrize("prompt", PROMPTS[:6])
def test_the_example_pair_writes_what_mlx_lm_writes(prompt: str) -> None:
    telemetry = Telemetry()

    ours, theirs = _ours(prompt, telemetry=telemetry), _theirs(prompt)

    assert "".join(response.text for response in ours) == "".join(response.text for response in theirs)
    assert [response.token for response in ours] == [response.token for response in theirs]
    assert ours[-1].finish_reason == theirs[-1].finish_reason
    assert (ours[-1].prompt_tokens, ours[-1].generation_tokens) == (
        theirs[-1].prompt_tokens,
        theirs[-1].generation_tokens,
    )
    # the drafter was trained for this target
    assert telemetry.mean_emitted_tokens_per_target_call > 1.3


def test_quantised_drafters_write_the_same_text() -> None:
    stock = make_pair()
    for bits in (4, 8):
        quantised = mlx_port.load(str(EXAMPLE / "target"), str(EXAMPLE / "drafter"), drafter_bits=bits)
        pair = Pair(stock.target, stock.tokenizer, quantised.drafter)
        telemetry = Telemetry()

        ours = _ours(PROMPTS[0], pair, telemetry=telemetry)

        assert [response.token for response in ours] == [response.token for response in _theirs(PROMPTS[0])]
        assert telemetry.accepted_draft_token_count > 0


def test_responses_are_mlx_lms_and_say_what_was_accepted() -> None:
    telemetry = Telemetry()

    responses = _ours(PROMPTS[0], telemetry=telemetry)

    assert all(isinstance(response, GenerationResponse) for response in responses)
    assert [response.generation_tokens for response in responses] == list(range(1, NUM_TOKENS + 1))
    assert [response.finish_reason for response in responses] == [None] * (NUM_TOKENS - 1) + ["length"]
    assert max(response.accepted_length for response in responses) == max(telemetry.accepted_lengths) > 0
    assert sum(response.from_draft for response in responses) <= telemetry.accepted_draft_token_count
    assert responses[0].logprobs.shape == (2048,)
    counters = telemetry.to_dict()
    assert counters["emittedTokenCount"] == NUM_TOKENS
    assert counters["roundCount"] == len(telemetry.accepted_lengths)
    assert counters["acceptedDraftTokenCount"] == sum(telemetry.accepted_lengths)


def test_an_end_of_text_inside_an_accepted_path_ends_the_text_and_the_caches() -> None:
    target, tokenizer, drafter = make_pair()
    prompt = tokenizer.encode(PROMPTS[1])
    text = alone(target, prompt, NUM_TOKENS)
    whole = _ours(PROMPTS[1])
    # a token that was drafted, accepted, and followed by another accepted one
    end = next(i for i in range(4, NUM_TOKENS - 1) if whole[i].from_draft and whole[i + 1].from_draft)
    end = text.index(text[end])
    stopping = type(tokenizer)(tokenizer._tokenizer, eos_token_ids=[text[end]])
    caches = make_prompt_cache(target.model)

    responses = list(stream_generate(target, stopping, prompt, drafter, max_tokens=NUM_TOKENS, prompt_cache=caches))

    assert [response.token for response in responses] == text[: end + 1]
    assert responses[-1].finish_reason == "stop"
    assert "".join(response.text for response in responses) == tokenizer.decode(text[:end])
    assert {layer.offset for layer in caches} == {len(prompt) + end + 1}


def test_a_text_as_tokens_is_taken_as_it_is() -> None:
    target, tokenizer, drafter = make_pair()
    token_ids = tokenizer.encode(PROMPTS[2])

    texts = [
        [response.token for response in stream_generate(target, tokenizer, prompt, drafter, max_tokens=8)]
        for prompt in (PROMPTS[2], token_ids, mx.array(token_ids))
    ]

    assert texts[0] == texts[1] == texts[2]


def test_a_budget_over_63_is_refused() -> None:
    with pytest.raises(ValueError, match="the tree budget is 64, but it must lie between 1 and 63"):
        _ours(PROMPTS[0], tree_budget=64)
