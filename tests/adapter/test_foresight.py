"""What drafts are told of the next draws is what vLLM's sampler then draws."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.sampler import Sampler

from vllm_redrafter.adapter import foresight

VOCAB = 300
ALL = torch.arange(VOCAB)
PLAIN = SamplingParams(temperature=1.0)


def draws(sampler: Sampler, generators: dict[int, torch.Generator], num_requests: int, depths: int) -> torch.Tensor:
    """Return what vLLM draws from flat distributions, [requests, depths]."""
    flat = torch.zeros(num_requests, VOCAB)
    return torch.stack([sampler.topk_topp_sampler(flat.clone(), generators, None, None)[0] for _ in range(depths)], 1)


def test_the_next_draws_of_every_request_are_known() -> None:
    generators = {0: torch.Generator().manual_seed(0), 1: foresight.own_generator(), 2: foresight.own_generator()}
    for _ in range(2):
        foresee = foresight.of(generators, dict.fromkeys(range(3), PLAIN), 4, ALL)
        assert foresee is not None

        drawn = draws(Sampler(), generators, 3, 4)

        flat = torch.zeros(3, 2, VOCAB)
        for depth in range(4):
            assert torch.equal(foresee(depth, flat).argmax(dim=-1), drawn[:, depth, None].expand(-1, 2))
        assert len(set(drawn.flatten().tolist())) > 8


def test_generators_without_a_seed_differ_and_follow_from_torchs_own() -> None:
    def draws() -> list[int]:
        return [int(torch.randint(1 << 40, (), generator=foresight.own_generator())) for _ in range(3)]

    torch.manual_seed(5)
    first, later = draws(), draws()
    torch.manual_seed(5)

    assert draws() == first
    assert len({*first, *later}) == 6


def test_it_is_known_for_some_of_the_batch_and_of_the_vocabulary() -> None:
    generators = {place: torch.Generator().manual_seed(place) for place in range(4)}
    whole = foresight.of(generators, dict.fromkeys(range(4), PLAIN), 3, ALL)
    assert whole is not None
    greedy, cool, hot = (SamplingParams(temperature=temperature) for temperature in (0.0, 0.5, 2.0))
    logits = torch.randn(3, 2, 13, generator=torch.Generator().manual_seed(1))

    part = foresight.of(generators, {3: cool, 1: hot, 0: greedy}, 3, ALL[7:20])

    assert part is not None
    for depth in range(3):
        noise = whole(depth, torch.zeros(4, 1, VOCAB))[..., 7:20]
        torch.testing.assert_close(part(depth, logits)[0], logits[0] + 0.5 * noise[3])
        torch.testing.assert_close(part(depth, logits)[1], logits[1] + 2.0 * noise[1])
        assert torch.equal(part(depth, logits)[2], logits[2]), "a greedy request"
    assert foresight.of(generators, {0: greedy, 2: greedy}, 3, ALL) is None


@pytest.mark.parametrize("vocab_size", [50_000, 200_000], ids=["two depths at once", "one depth at once"])
def test_a_large_vocabulary_is_told_the_same_in_several_goes(vocab_size: int) -> None:
    generators = {0: torch.Generator().manual_seed(0)}
    large = foresight.of(generators, {0: PLAIN}, 5, torch.arange(vocab_size))
    small = foresight.of(generators, {0: PLAIN}, 5, ALL)
    assert large is not None
    assert small is not None

    for depth in range(5):
        found = large(depth, torch.zeros(1, 1, vocab_size))[..., :VOCAB]
        assert torch.equal(found, small(depth, torch.zeros(1, 1, VOCAB)))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 6}, {"top_p": 0.3}, {"top_p": 0.9}, {"min_p": 0.2}])
def test_a_drafter_that_knows_its_target_foresees_what_truncated_requests_draw(options: dict[str, float]) -> None:
    parameters = SamplingParams(temperature=0.8, seed=3, **options)
    generators = {0: torch.Generator().manual_seed(3)}
    logits = 2 * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4))
    foresee = foresight.of(generators, {0: parameters}, 12, ALL)
    assert foresee is not None
    foreseen = [int(foresee(depth, logits[None]).argmax()) for depth in range(12)]

    drawn = []
    for _ in range(12):
        cooled = logits / parameters.temperature
        probs = cooled.softmax(dim=-1)
        cooled = cooled.masked_fill(probs < parameters.min_p * probs.max(), -float("inf"))
        top_k = torch.tensor([parameters.top_k]) if parameters.top_k > 0 else None
        top_p = torch.tensor([parameters.top_p]) if parameters.top_p < 1 else None
        drawn.append(int(Sampler().topk_topp_sampler(cooled, generators, top_k, top_p)[0]))

    assert foreseen == drawn
    assert len(set(drawn)) > (1 if parameters.top_k != 1 else 0)


def test_a_sampler_with_other_noise_is_found_out() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()

    assert foresight.is_possible(Sampler())
    assert not foresight.is_possible(Sampler(use_fp64_gumbel=True))
    stuck = SimpleNamespace(topk_topp_sampler=lambda logits, *_: (torch.zeros(1, dtype=torch.int64), None))
    assert not foresight.is_possible(stuck)
    assert torch.equal(torch.get_rng_state(), before)
