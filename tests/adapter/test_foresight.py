"""The noise that drafts are told of is the one that vLLM's sampler then draws with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.sample.sampler import Sampler

from vllm_redrafter.adapter import foresight

VOCAB = 300
ALL = torch.arange(VOCAB)


def draws(sampler: Sampler, generators: dict[int, torch.Generator], num_requests: int, depths: int) -> torch.Tensor:
    """Return what vLLM draws from flat distributions, [requests, depths]."""
    flat = torch.zeros(num_requests, VOCAB)
    return torch.stack([sampler.topk_topp_sampler(flat.clone(), generators, None, None)[0] for _ in range(depths)], 1)


@pytest.mark.parametrize("seeded", [(), (0, 1, 2), (1,)], ids=["nobody", "everybody", "one of three"])
def test_the_next_draws_of_every_request_are_known(seeded: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    generators = {place: torch.Generator().manual_seed(place) for place in seeded}
    for _ in range(2):
        before = torch.get_rng_state()
        noise = foresight.noise(generators, 3, dict.fromkeys(range(3), 1.0), 4, ALL)
        assert noise is not None
        assert torch.equal(torch.get_rng_state(), before)

        drawn = draws(Sampler(), generators, 3, 4)

        assert torch.equal(torch.stack([noise(depth).argmax(dim=-1) for depth in range(4)], dim=1), drawn)
        assert len(set(drawn.flatten().tolist())) > 8


def test_it_is_told_for_some_of_the_batch_and_of_the_vocabulary() -> None:
    generators = {place: torch.Generator().manual_seed(place) for place in range(4)}
    whole = foresight.noise(generators, 4, dict.fromkeys(range(4), 1.0), 3, ALL)
    assert whole is not None

    part = foresight.noise(generators, 4, {3: 0.5, 1: 2.0, 0: 0.0}, 3, ALL[7:20])

    assert part is not None
    for depth in range(3):
        torch.testing.assert_close(part(depth)[0], 0.5 * whole(depth)[3, 7:20])
        torch.testing.assert_close(part(depth)[1], 2.0 * whole(depth)[1, 7:20])
        assert not part(depth)[2].any(), "a greedy request"
    assert foresight.noise(generators, 4, {0: 0.0, 2: 0.0}, 3, ALL) is None


def test_a_sampler_with_other_noise_is_found_out() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()

    assert foresight.is_possible(Sampler())
    assert not foresight.is_possible(Sampler(use_fp64_gumbel=True))
    stuck = SimpleNamespace(topk_topp_sampler=lambda logits, *_: (torch.zeros(1, dtype=torch.int64), None))
    assert not foresight.is_possible(stuck)
    assert torch.equal(torch.get_rng_state(), before)
