from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_redrafter.kernels import reference

sampling_noise = pytest.importorskip(
    "vllm_redrafter.kernels.sampling_noise", reason="needs Triton", exc_type=ImportError
)
verify_walk = pytest.importorskip("vllm_redrafter.kernels.verify_walk", reason="needs Triton", exc_type=ImportError)

POSITIONS = torch.tensor([0, 17, 1 << 20, 17])
TEMPERATURES = torch.tensor([1.0, 0.3, 2.0, 0.0])
SEEDS = torch.tensor([5, -(1 << 62) + 3, 123456789012345, 5])


@pytest.mark.parametrize("num_tokens", [1, 100, 1024, 1025, 3000])
def test_the_kernel_computes_what_its_twin_computes(num_tokens: int) -> None:
    token_ids = torch.randperm(200_000, generator=torch.Generator().manual_seed(1))[:num_tokens].sort().values
    rows = POSITIONS, TEMPERATURES, SEEDS, token_ids

    added = sampling_noise.sampling_noise(*rows)

    torch.testing.assert_close(added, reference.sampling_noise(*rows), rtol=1e-4, atol=1e-5)
    assert added[:3].std() > 0.1 or num_tokens == 1
    assert not added[3].any(), "a greedy request"


@pytest.mark.parametrize("twin", [sampling_noise, reference], ids=["kernel", "reference"])
def test_at_a_depth_positions_stand_so_much_further(twin: Any) -> None:
    token_ids = torch.arange(50)

    added = twin.sampling_noise(POSITIONS, TEMPERATURES, SEEDS, token_ids, 3)

    assert torch.equal(added, twin.sampling_noise(POSITIONS + 3, TEMPERATURES, SEEDS, token_ids))


@pytest.mark.parametrize("twin", [sampling_noise, reference], ids=["kernel", "reference"])
def test_it_is_what_tokens_are_drawn_with(twin: object) -> None:
    num_rows, vocab_size = 60, 500
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(num_rows, vocab_size, generator=generator)
    positions = torch.randint(1 << 20, (num_rows,), generator=generator)
    requests = torch.arange(num_rows, dtype=torch.int32) % 3
    temperatures, seeds = TEMPERATURES[:3], SEEDS[:3]
    drawn = verify_walk.target_tokens(
        logits / temperatures[requests][:, None], positions, requests, temperatures, seeds
    )

    added = twin.sampling_noise(positions, temperatures[requests], seeds[requests], torch.arange(vocab_size))  # type: ignore[attr-defined]

    assert torch.equal((logits + added).argmax(dim=1), drawn)
    assert (logits.argmax(dim=1) != drawn).any()
