"""Beam search with the drafter (arXiv 2403.09919, section 3.2): deterministic, fp32, no (W, T, V) tensor.

Besides the surviving beams it hands back every candidate that it scored well on the way: the token tree picks its nodes
from those, so a continuation that lost its place among the beams can still be verified.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_port.drafter import DraftState, Embed, ReDrafter


class BeamShape(NamedTuple):
    """How far and how wide to search."""

    width: int
    """Beams expanded at every depth."""
    length: int
    """Tokens drafted per beam, the init token not counted (Apple's `beam_length` is one more)."""


class Candidates(NamedTuple):
    """Scored continuations, depth by depth, parents before children: C = sum over the depths of the candidates kept."""

    token_ids: mx.array  # [C]: the target's token ids
    parents: mx.array  # [C]: index of the candidate that it continues, -1 for the init token
    log_probs: mx.array  # [C]: cumulative log-probability, fp32; -inf where there is no candidate


def search(
    drafter: ReDrafter,
    embed: Embed,
    hidden: mx.array,  # [hidden_size]
    init_id: mx.array,  # []
    shape: BeamShape,
    num_candidates: int | None = None,
) -> Candidates:
    """Return the best continuations of `init_id` by cumulative log-probability.

    At each depth the best `num_candidates` (at least `shape.width`, which is also the default) continuations of the
    live beams are kept, best first, and the best `shape.width` of those are the beams of the next depth.

    Args:
        hidden: the target's last hidden state at the token before `init_id`.
        num_candidates: candidates kept per depth; more than the width enlarges the choice of leaves at no extra cost.

    Raises:
        ValueError: the shape holds a number below 1.
    """
    if shape.width < 1 or shape.length < 1:
        raise ValueError(f"beam shape {tuple(shape)} is not usable: width and length must be at least 1")
    kept = max(shape.width, num_candidates or 0)
    target_ids = drafter.target_ids()

    state = drafter.start(hidden[None])
    token_ids = init_id[None]  # [beams]
    scores = mx.zeros(1)  # [beams]
    first_beam, num_found = -1, 0  # the beams are the candidates from `first_beam` on
    depths: list[Candidates] = []
    for _ in range(shape.length):
        state = drafter.advance(state, embed(token_ids).astype(state.recurrent.dtype))
        log_probs = drafter.log_probs(state)  # [beams, head]
        head_size = log_probs.shape[-1]
        totals = (log_probs + scores[:, None]).flatten()
        best = _best(totals, min(kept, totals.size))  # [kept]
        parent_beams, draft_ids = best // head_size, best % head_size
        best_ids = draft_ids if target_ids is None else target_ids[draft_ids]
        best_scores = totals[best]
        depths.append(Candidates(best_ids, parent_beams + first_beam, best_scores))

        first_beam, num_found = num_found, num_found + best.size
        token_ids, scores = best_ids[: shape.width], best_scores[: shape.width]
        # the recurrent state already holds the parent's token: it follows the beam that was continued
        state = DraftState(state.context, state.recurrent[parent_beams[: shape.width]])
    return Candidates(*(mx.concatenate(columns) for columns in zip(*depths, strict=True)))


def _best(totals: mx.array, count: int) -> mx.array:
    """Return where the `count` highest totals stand, the highest first, [count] int32."""
    if count == 1:
        # on Metal every partition is a sort of the whole
        return mx.argmax(totals, keepdims=True).astype(mx.int32)
    found = mx.argpartition(-totals, count - 1)[:count].astype(mx.int32)
    return found[mx.argsort(-totals[found])]
