from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from tests.mlx_port.tiny_models import make_drafter
from tests.mlx_port.twins import EXAMPLE, VARIANTS, Twins, load_twins, save_random, to_numpy


def _states(twins: Twins) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return logits and log-probabilities after three tokens on four beams, by torch and by MLX."""
    random = np.random.default_rng(2)
    hidden = random.normal(size=(1, twins.torch.config.hidden_size)).astype(np.float32)
    tokens = random.integers(twins.torch.config.vocab_size, size=(3, 4))
    theirs, ours = twins.torch.start(torch.from_numpy(hidden)), twins.mlx.start(mx.array(hidden))
    for row in tokens:
        theirs = twins.torch.advance(theirs, twins.torch_embed(torch.from_numpy(row)))
        ours = twins.mlx.advance(ours, twins.mlx_embed(mx.array(row)))
    return (
        twins.torch.logits(theirs).numpy(),
        twins.torch.processed_logits(theirs).log_softmax(dim=-1).numpy(),
        to_numpy(twins.mlx.logits(ours)),
        to_numpy(twins.mlx.log_probs(ours)),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_torch(variant: str, tmp_path: Path) -> None:
    logits, log_probs, our_logits, our_log_probs = _states(load_twins(save_random(tmp_path, **VARIANTS[variant])))

    # sums of up to 64 products of size 1 in another order, in float32
    np.testing.assert_allclose(our_logits, logits, atol=2e-4, rtol=1e-5)
    np.testing.assert_allclose(our_log_probs, log_probs, atol=2e-4, rtol=1e-5)
    assert np.isneginf(log_probs).any() == ("top" in variant)


def test_logits_of_the_example_pair_are_those_of_torch() -> None:
    logits, log_probs, our_logits, our_log_probs = _states(load_twins(EXAMPLE / "drafter"))

    # sums of up to 512 products in another order, in float32
    np.testing.assert_allclose(our_logits, logits, atol=2e-3, rtol=1e-5)
    np.testing.assert_allclose(our_log_probs, log_probs, atol=2e-3, rtol=1e-5)


def test_equal_scores_at_the_threshold_are_all_kept() -> None:
    drafter = make_drafter(top_k=2)
    drafter = type(drafter)(drafter.config)
    drafter.lm_head[-1].weight = mx.zeros((11, 128))
    drafter.lm_head[-1].weight[3] = 1

    log_probs = drafter.log_probs(drafter.advance(drafter.start(mx.ones(64)), mx.ones(64)))

    assert int((log_probs > -mx.inf).sum()) == 11


def test_a_tied_head_must_be_lent_first() -> None:
    drafter = make_drafter(tie_lm_head=True, exit_dim=64, num_draft_layers=2)

    with pytest.raises(RuntimeError, match=r"tied to the target's: call tie_head\(\) first"):
        drafter.logits(drafter.start(mx.ones(64)))
    with pytest.raises(ValueError, match="this drafter has its own head"):
        make_drafter().tie_head(drafter)
