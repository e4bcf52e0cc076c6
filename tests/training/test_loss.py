"""The three losses are their formulas, and their gradients those of autograd."""

from __future__ import annotations

import pytest
import torch

from vllm_redrafter.training.loss import TOKEN_LOSSES, Expected

PLACES, HEAD, VOCAB = 7, 5, 9


def expected_at(seed: int = 0) -> Expected:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(PLACES, VOCAB, generator=generator, dtype=torch.float64).softmax(dim=-1)[:, :HEAD]
    labels = torch.randint(HEAD, (PLACES,), generator=generator)
    return Expected(probs, -(probs * probs.log()).sum(dim=-1), labels)


def by_definition(name: str, logits: torch.Tensor, expected: Expected) -> torch.Tensor:
    q = (logits - logits.max(dim=-1, keepdim=True).values).exp()
    q = q / q.sum(dim=-1, keepdim=True)
    rows = []
    for place in range(PLACES):
        p = expected.probs[place]
        if name == "ce":
            rows.append(-q[place, expected.labels[place]].log())
        elif name == "kl":
            rows.append(sum(p[token] * (p[token].log() - q[place, token].log()) for token in range(HEAD)))
        else:
            rows.append(-sum(torch.minimum(p[token], q[place, token]) for token in range(HEAD)).log())
    return torch.stack([torch.as_tensor(row) for row in rows])


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_loss_and_its_gradient_are_those_of_its_definition(name: str) -> None:
    expected = expected_at()
    logits = 3 * torch.randn(PLACES, HEAD, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()

    loss = TOKEN_LOSSES[name](logits, expected)
    reference = by_definition(name, logits, expected)

    torch.testing.assert_close(loss, reference)
    weights = torch.arange(1, PLACES + 1)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), logits, retain_graph=True)
    (reference_gradient,) = torch.autograd.grad((reference * weights).sum(), logits)
    torch.testing.assert_close(gradient, reference_gradient)


def test_a_drafter_that_says_what_the_target_says_has_no_divergence_and_is_always_accepted() -> None:
    probs = torch.randn(PLACES, HEAD, dtype=torch.float64).softmax(dim=-1)
    expected = Expected(probs, torch.special.entr(probs).sum(dim=-1), torch.zeros(PLACES, dtype=torch.int64))

    for name in ("kl", "lk"):
        torch.testing.assert_close(TOKEN_LOSSES[name](probs.log(), expected), torch.zeros(PLACES, dtype=torch.float64))


def test_a_token_that_cannot_be_drafted_costs_nothing() -> None:
    expected = expected_at()._replace(labels=torch.tensor([-1, 0, -1, 1, 2, -1, 4]))

    loss = TOKEN_LOSSES["ce"](torch.zeros(PLACES, HEAD), expected)

    assert (loss == 0).tolist() == [True, False, True, False, False, True, False]


def test_a_draft_that_cannot_be_accepted_gives_a_finite_loss_and_gradient() -> None:
    probs = torch.tensor([[1.0, 0.0]])
    logits = torch.tensor([[-1e4, 0.0]], requires_grad=True)
    expected = Expected(probs, torch.zeros(1), torch.zeros(1, dtype=torch.int64))

    loss = TOKEN_LOSSES["lk"](logits, expected)
    loss.sum().backward()

    assert torch.isfinite(loss).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
