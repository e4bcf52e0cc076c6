"""Noise has its distribution, is SplitMix64's, and can be foreseen without being used up."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from vllm_redrafter.core.noise import NoisySampler, Truncation, draw_seeds, foresee_seeds, gumbel

WORD = (1 << 64) - 1


def in_loops(seed: int, token_id: int) -> float:
    """Return the noise of one token, in Python's integers."""

    def mixed(bits: int) -> int:
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & WORD
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & WORD
        return bits ^ (bits >> 31)

    bits = mixed(mixed(seed) + (token_id + 1) * 0x9E3779B97F4A7C15 & WORD)
    return -math.log(-math.log(((bits >> 11) + 0.5) / 2**53))


def test_splitmix64_is_the_published_one() -> None:
    # the first numbers of the generator that starts at 0, of which `gumbel` with seed 0 takes the upper 53 bits
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]

    uniform = (-(-gumbel(torch.tensor(0), torch.arange(3)).double()).exp()).exp()

    assert uniform.tolist() == pytest.approx([bits / 2**64 for bits in published], rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1])
def test_every_token_has_its_own_number_whatever_others_are_asked_for(seed: int) -> None:
    token_ids = torch.tensor([0, 5, 6, 4095, 151_935])

    found = gumbel(torch.tensor([[seed, 3]]), token_ids)

    assert found.shape == (1, 2, 5)
    assert found.dtype == torch.float32
    assert found[0, 0].tolist() == pytest.approx([in_loops(seed, token) for token in token_ids.tolist()], rel=1e-6)
    assert torch.equal(found[0, 0, 2], gumbel(torch.tensor(seed), torch.tensor([6]))[0])


def test_numbers_have_gumbels_distribution_along_seeds_and_along_tokens() -> None:
    numbers = gumbel(torch.arange(500), torch.arange(400))

    assert stats.kstest(numbers.flatten().numpy(), "gumbel_r").pvalue > 0.01
    assert stats.kstest(numbers[0].numpy(), "gumbel_r").pvalue > 0.01
    assert stats.kstest(numbers[:, 0].numpy(), "gumbel_r").pvalue > 0.01
    assert abs(np.corrcoef(numbers[:-1].flatten(), numbers[1:].flatten())[0, 1]) < 0.01


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_distribution_of_that_temperature(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -float("inf")])
    num_draws = 100_000

    drawn = NoisySampler(temperature, seed=1)(logits.expand(num_draws, -1))

    counts = drawn.bincount(minlength=6).double()
    expected = num_draws * (logits / temperature).double().softmax(dim=0)
    assert counts[5] == 0
    assert stats.chisquare(counts[:5], expected[:5]).pvalue > 0.001


def test_what_is_foreseen_is_drawn() -> None:
    sampler, token_ids = NoisySampler(0.7, seed=9), torch.tensor([1, 4, 7, 8])
    foreseen = sampler.foresee(6, token_ids)

    assert torch.equal(foreseen, sampler.foresee(6, token_ids)), "looking ahead draws nothing"
    alone = torch.full((1, 10), -float("inf"))
    alone[0, token_ids] = 0
    for row in foreseen:
        assert int(sampler(alone)) == int(token_ids[row.argmax()])


def test_seeds_are_foreseen_of_any_generator() -> None:
    torch.manual_seed(3)
    own = torch.Generator().manual_seed(4)
    for generator in (own, torch.default_generator):
        foreseen = foresee_seeds(generator, 5)
        drawn = [int(draw_seeds(None if generator is torch.default_generator else generator, 1)) for _ in range(5)]
        assert foreseen.tolist() == drawn


def truncation(**options: float) -> Truncation:
    return Truncation.of([SimpleNamespace(**{"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options})])


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_k": 5}, {"top_p": 0.2}, {"top_p": 0.8}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.6}]
)
@pytest.mark.parametrize("num_tokens", [3, 40, 600])
def test_what_is_left_out_competes_without_noise(options: dict[str, float], num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    logits = 2 * torch.randn(1, 3, num_tokens, generator=generator)
    noise = 0.7 * gumbel(torch.tensor([[4]]), torch.arange(num_tokens))

    lifted = truncation(**options).lift(logits, noise)

    for beam, changed in zip(logits[0], lifted[0], strict=True):
        order = beam.argsort(descending=True).tolist()
        probs = (beam / 0.7).softmax(dim=0)
        kept, mass = set(), 0.0
        for rank, token in enumerate(order):
            if rank >= options.get("top_k", num_tokens) or mass >= options.get("top_p", 1.0):
                break
            if probs[token] < options.get("min_p", 0.0) * probs[order[0]]:
                break
            kept.add(token)
            mass += float(probs[token])
        inside, outside = sorted(kept), sorted(set(order) - kept)
        assert torch.equal(changed[outside], beam[outside])
        noisy = (beam + noise[0, 0])[inside]
        torch.testing.assert_close(changed[inside], noisy - noisy.max() + beam.max())


def test_nothing_left_out_is_noise_alone_and_one_token_left_is_greedy() -> None:
    logits = torch.randn(1, 2, 20, generator=torch.Generator().manual_seed(1))
    noise = gumbel(torch.tensor([[4]]), torch.arange(20))

    assert torch.equal(truncation().lift(logits, noise), logits + noise)
    torch.testing.assert_close(truncation(top_k=1).lift(logits, noise), logits)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_sampler_without_a_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        NoisySampler(temperature, seed=1)
