"""The target's own texts: greedy ones are its argmax, sampled ones its distribution, whatever stands in the batch."""

from __future__ import annotations

import pytest
import torch

from tests.training.small import make_target
from vllm_redrafter.core.decoding import autoregressive
from vllm_redrafter.core.noise import NoisySampler
from vllm_redrafter.training.target import FrozenTarget
from vllm_redrafter.training.transcripts import Transcript, transcribe

LENGTHS = (5, 2, 9, 5, 1)


@pytest.fixture
def target() -> FrozenTarget:
    return make_target()


def prompts() -> list[Transcript]:
    generator = torch.Generator().manual_seed(8)
    return [Transcript(torch.randint(50, (n + 3,), generator=generator), n, f"source {n}") for n in LENGTHS]


def test_greedy_texts_are_those_of_decoding_one_by_one(target: FrozenTarget) -> None:
    written = transcribe(target, prompts(), 12)

    for prompt, transcript in zip(prompts(), written, strict=True):
        given = prompt.token_ids[: prompt.num_prompt_tokens]
        alone = autoregressive(target.model, given, 12)
        assert transcript.token_ids.tolist() == given.tolist() + alone.token_ids
        assert (transcript.num_prompt_tokens, transcript.source) == (prompt.num_prompt_tokens, prompt.source)


def test_a_text_ends_with_the_token_that_ends_it(target: FrozenTarget) -> None:
    free = transcribe(target, prompts(), 12)[0].token_ids[5:].tolist()
    stop = free[3]
    target.stop_token_ids = [stop, 49]

    stopped = transcribe(target, prompts(), 12)[0].token_ids[5:].tolist()

    assert stopped == free[: free.index(stop) + 1]


def test_sampled_texts_are_repeatable_and_leave_the_global_seed_alone(target: FrozenTarget) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)

    first = transcribe(target, prompts(), 8, temperature=1.0, seed=5)
    second = transcribe(target, prompts(), 8, temperature=1.0, seed=5)
    other = transcribe(target, prompts(), 8, temperature=1.0, seed=6)

    assert torch.equal(torch.rand(3), expected)
    assert [each.token_ids.tolist() for each in first] == [each.token_ids.tolist() for each in second]
    assert [each.token_ids.tolist() for each in first] != [each.token_ids.tolist() for each in other]


def test_sampled_texts_are_those_of_the_sampler_with_their_seeds(target: FrozenTarget) -> None:
    for each in transcribe(target, prompts(), 8, temperature=0.7, seed=2):
        assert each.seed is not None
        prompt = each.token_ids[: each.num_prompt_tokens]

        text = autoregressive(target.model, prompt, 8, sample=NoisySampler(0.7, each.seed))

        assert each.token_ids[len(prompt) :].tolist() == text.token_ids


def test_a_targets_own_sampling_defaults_do_not_bend_its_distribution(target: FrozenTarget) -> None:
    assert target.model.generation_config is not None
    target.model.generation_config.update(top_k=1, repetition_penalty=5.0, do_sample=True)

    greedy = transcribe(target, prompts()[:1], 12)[0].token_ids
    sampled = transcribe(target, prompts()[:1] * 20, 1, temperature=1.0)

    assert greedy[5:].tolist() == autoregressive(target.model, prompts()[0].token_ids[:5], 12).token_ids
    assert len({int(each.token_ids[-1]) for each in sampled}) > 1
