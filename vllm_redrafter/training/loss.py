"""What a draft is held against, token by token: the data, the target's distribution, or the chance to be accepted.

With p the target's distribution at a place (over its whole vocabulary), q the drafter's, D the tokens that the drafter
knows and x the token of the data:

    ce   −log q(x)                             as Apple's trainer has it
    kl   Σ_D p (log p − log q)                 the forward divergence, of which p outside D is a constant
    lk   −log Σ_D min(p, q)                    minus the log of the mass that rejection sampling would accept

Each is a function of the drafter's logits and not of log q, which would be one more tensor of that size to write, and
another one to keep for the backward pass: they cost more than the products with the head do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Expected(NamedTuple):
    """What the target or the data has at some places, in terms of the draft vocabulary."""

    probs: torch.Tensor  # [..., head_size]: the target's, normalised over its whole vocabulary
    entropy: torch.Tensor  # [...]: −Σ_D p log p
    labels: torch.Tensor  # [...]: draft id of the data's token, -1 where the drafter does not know it


TokenLoss = Callable[[torch.Tensor, Expected], torch.Tensor]
"""Takes the drafter's logits [..., head_size] and returns a loss per place, [...]."""


def cross_entropy(logits: torch.Tensor, expected: Expected) -> torch.Tensor:
    """Return −log q(x); 0 where the drafter does not know x."""
    picked = logits.gather(-1, expected.labels.clamp(min=0)[..., None])[..., 0]
    return (logits.logsumexp(dim=-1) - picked).masked_fill(expected.labels < 0, 0)


def divergence(logits: torch.Tensor, expected: Expected) -> torch.Tensor:
    """Return Σ_D p (log p − log q)."""
    mass = expected.probs.sum(dim=-1)
    cross = mass * logits.logsumexp(dim=-1) - (expected.probs * logits).sum(dim=-1)
    return cross - expected.entropy


def likelihood_of_acceptance(logits: torch.Tensor, expected: Expected) -> torch.Tensor:
    """Return −log Σ_D min(p, q)."""
    accepted = torch.minimum(logits.softmax(dim=-1), expected.probs).sum(dim=-1)
    # where nothing at all would be accepted there is no gradient either
    return -accepted.clamp(min=torch.finfo(accepted.dtype).tiny).log()


TOKEN_LOSSES: dict[str, TokenLoss] = {"ce": cross_entropy, "kl": divergence, "lk": likelihood_of_acceptance}
"""The losses by the names of `--loss`."""
