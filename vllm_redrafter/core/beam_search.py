"""Batched beam search with the drafter (arXiv 2403.09919, section 3.2): deterministic, fp32, no (W, T, V) tensor.

Besides the surviving beams it hands back every candidate that it scored well on the way: the token tree picks its nodes
from those, so a continuation that lost its place among the beams can still be verified.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from vllm_redrafter.core.drafter import DraftState, Embed, ReDrafter

SHARPNESS = 1.25
"""What logits are multiplied by where it is settled which token follows a context, if only the drafter knew: in greedy
text, and in sampled text whose noise is foreseen. There a drafter's first guess is right more often than its
probability says, and its second one less often. Between 1 and 1.5 a tree of 8 accepts most, in greedy text 1.5% more
than without (measured on held-out texts). Where the noise is not known, the drafter's own distribution ranks best."""


Foresight = Callable[[int, torch.Tensor], torch.Tensor]
"""Given a depth from 0 and the drafter's logits there, [batch, beams, head_size] fp32, returns logits that rank first
what sampling will draw (`core.noise`)."""


class BeamShape(NamedTuple):
    """How far and how wide to search."""

    width: int
    """Beams expanded at every depth."""
    length: int
    """Tokens drafted per beam, the init token not counted (Apple's `beam_length` is one more)."""


class Candidates(NamedTuple):
    """Scored continuations, depth by depth, parents before children: C = sum over the depths of the candidates kept."""

    token_ids: torch.Tensor  # [batch, C]: the target's token ids
    parents: torch.Tensor  # [batch, C]: index of the candidate that it continues, -1 for the init token
    log_probs: torch.Tensor  # [batch, C]: cumulative log-probability, fp32; -inf where there is no candidate


class Continuations(NamedTuple):
    """The best next tokens of all beams of a request, best first."""

    beams: torch.Tensor  # [batch, kept]: what they continue
    draft_ids: torch.Tensor  # [batch, kept]
    log_probs: torch.Tensor  # [batch, kept]: cumulative, fp32


Choose = Callable[[torch.Tensor, torch.Tensor, int], Continuations]
"""Given the head's logits, the beams' log-probabilities and a number, returns so many continuations."""


def best_continuations(
    logits: torch.Tensor,  # [batch, beams, head_size] fp32
    scores: torch.Tensor,  # [batch, beams]: cumulative log-probabilities
    num_kept: int,
) -> Continuations:
    """Return the best `num_kept` continuations, or all where there are fewer."""
    totals = (logits.log_softmax(dim=-1) + scores[..., None]).flatten(1)
    best = totals.topk(min(num_kept, totals.shape[1]), dim=-1)
    head_size = logits.shape[-1]
    return Continuations(best.indices // head_size, best.indices % head_size, best.values)


def search(
    drafter: ReDrafter,
    embed: Embed,
    hidden: torch.Tensor,  # [batch, input_size]
    init_ids: torch.Tensor,  # [batch]
    shape: BeamShape,
    num_candidates: int | None = None,
    floor: float = float("-inf"),
    sharpness: float = 1.0,
    foresight: Foresight | None = None,
    choose: Choose = best_continuations,
) -> Candidates:
    """Return the best continuations of `init_ids` by cumulative log-probability.

    At each depth the best `num_candidates` (at least `shape.width`, which is also the default) continuations of the
    live beams are kept, best first, and the best `shape.width` of those are the beams of the next depth.

    Args:
        hidden: what `ReDrafter.start` takes, at the token before `init_ids`.
        num_candidates: candidates kept per depth; more than the width enlarges the choice of leaves at no extra cost.
        floor: cumulative log-probability that a beam must exceed for the search to go on; it ends when none does.
        sharpness: what the drafter's logits are multiplied by; 1 leaves its distribution as it is.
        foresight: what is made of the drafter's logits before they are multiplied; None where nothing is sampled, or
            nothing is known of it.
        choose: what finds the best continuations; another one where the drafter holds a part of its head.

    Raises:
        ValueError: the shape holds a number below 1.
    """
    if shape.width < 1 or shape.length < 1:
        raise ValueError(f"beam shape {tuple(shape)} is not usable: width and length must be at least 1")
    kept = max(shape.width, num_candidates or 0)
    target_ids = drafter.target_ids()
    rows = torch.arange(len(init_ids), device=hidden.device)[:, None]

    state = drafter.start(hidden[:, None])
    token_ids = init_ids[:, None]  # [batch, beams]
    scores = torch.zeros(len(init_ids), 1, device=hidden.device)  # [batch, beams]
    first_beam, num_found = -1, 0  # the beams are the candidates from `first_beam` on
    depths: list[Candidates] = []
    for depth in range(shape.length):
        state = drafter.advance(state, embed(token_ids).to(state.recurrent.dtype))
        change = None if foresight is None else partial(foresight, depth)
        best = choose(drafter.processed_logits(state, sharpness, change), scores, kept)
        best_ids = best.draft_ids if target_ids is None else target_ids[best.draft_ids]
        depths.append(Candidates(best_ids, best.beams + first_beam, best.log_probs))

        # waits for the device, and only where a floor is given
        if floor > float("-inf") and float(best.log_probs[:, 0].max()) <= floor:
            break
        first_beam, num_found = num_found, num_found + best_ids.shape[1]
        token_ids, scores = best_ids[:, : shape.width], best.log_probs[:, : shape.width]
        # the recurrent state already holds the parent's token: it follows the beam that was continued
        state = DraftState(state.context, state.recurrent[rows, best.beams[:, : shape.width]])
    return Candidates(*(torch.cat(columns, dim=1) for columns in zip(*depths, strict=True)))
