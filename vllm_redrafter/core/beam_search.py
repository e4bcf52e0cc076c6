"""Batched beam search with the drafter (arXiv 2403.09919, section 3.2): deterministic, fp32, no (W, T, V) tensor.

Besides the surviving beams it hands back every candidate that it scored well on the way: the token tree picks its nodes
from those, so a continuation that lost its place among the beams can still be verified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Beams(NamedTuple):
    """The live beams of all requests, and how far their search has come."""

    state: DraftState  # [batch, beams, ...]
    token_ids: torch.Tensor  # [batch, beams]: the target's ids of the last tokens
    scores: torch.Tensor  # [batch, beams]: cumulative log-probabilities, best first
    depth: int
    """Tokens of each, the init token not counted."""
    first: int
    """Place of the first beam among the search's candidates, counted through all depths; -1 for the init token."""
    num_found: int
    """Candidates of all depths so far."""


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


class BeamSearch:
    """A search, depth by depth.

    At each depth the best `num_candidates` (at least `shape.width`, which is also the default) continuations of the
    live beams are kept, best first, and the best `shape.width` of those are the beams of the next depth.

    Args:
        num_candidates: candidates kept per depth; more than the width enlarges the choice of leaves at no extra cost.
        sharpness: what the drafter's logits are multiplied by; 1 leaves its distribution as it is.
        choose: what finds the best continuations; another one where the drafter holds a part of its head.

    Raises:
        ValueError: the shape holds a number below 1.
    """

    def __init__(
        self,
        drafter: ReDrafter,
        embed: Embed,
        shape: BeamShape,
        num_candidates: int | None = None,
        sharpness: float = 1.0,
        choose: Choose = best_continuations,
    ) -> None:
        if shape.width < 1 or shape.length < 1:
            raise ValueError(f"beam shape {tuple(shape)} is not usable: width and length must be at least 1")
        self._drafter = drafter
        self._embed = embed
        self._width, self._length = shape
        self._num_kept = max(shape.width, num_candidates or 0)
        self._sharpness = sharpness
        self._choose = choose
        self._target_ids = drafter.target_ids()

    def start(self, hidden: torch.Tensor, init_ids: torch.Tensor) -> Beams:  # [batch, input_size], [batch]
        """Return one beam per request, which has read nothing yet."""
        scores = torch.zeros(len(init_ids), 1, device=hidden.device)
        return Beams(self._drafter.start(hidden[:, None]), init_ids[:, None], scores, depth=0, first=-1, num_found=0)

    def extend(self, beams: Beams, foresight: Foresight | None = None) -> tuple[Candidates, Beams]:
        """Return the best continuations by one token, and the beams that the best of them are."""
        read = self._embed(beams.token_ids).to(beams.state.recurrent.dtype)
        state = self._drafter.advance(beams.state, read)
        change = None if foresight is None else partial(foresight, beams.depth)
        logits = self._drafter.processed_logits(state, self._sharpness, change)
        best = self._choose(logits, beams.scores, self._num_kept)
        token_ids = best.draft_ids if self._target_ids is None else self._target_ids[best.draft_ids]
        candidates = Candidates(token_ids, best.beams + beams.first, best.log_probs)

        live = slice(self._width)
        rows = torch.arange(len(token_ids), device=token_ids.device)[:, None]
        return candidates, Beams(
            # the recurrent state already holds the parent's token: it follows the beam that was continued
            DraftState(state.context, state.recurrent[rows, best.beams[:, live]]),
            token_ids[:, live],
            best.log_probs[:, live],
            beams.depth + 1,
            beams.num_found,
            beams.num_found + token_ids.shape[1],
        )

    def run(
        self,
        hidden: torch.Tensor,  # [batch, input_size]
        init_ids: torch.Tensor,  # [batch]
        floor: float = float("-inf"),
        foresight: Foresight | None = None,
    ) -> Candidates:
        """Return what `search` does."""
        beams = self.start(hidden, init_ids)
        depths: list[Candidates] = []
        for _ in range(self._length):
            candidates, beams = self.extend(beams, foresight)
            depths.append(candidates)
            # waits for the device, and only where a floor is given
            if floor > float("-inf") and float(beams.scores[:, 0].max()) <= floor:
                break
        return join(depths)


def join(depths: Sequence[Candidates]) -> Candidates:
    """Return the candidates of successive depths as one."""
    return Candidates(*(torch.cat(columns, dim=1) for columns in zip(*depths, strict=True)))


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
    """Return the best continuations of `init_ids` by cumulative log-probability; the arguments are `BeamSearch`'s.

    Args:
        hidden: what `ReDrafter.start` takes, at the token before `init_ids`.
        floor: cumulative log-probability that a beam must exceed for the search to go on; it ends when none does.
        foresight: what is made of the drafter's logits before they are multiplied; None where nothing is sampled, or
            nothing is known of it.

    Raises:
        ValueError: the shape holds a number below 1.
    """
    return BeamSearch(drafter, embed, shape, num_candidates, sharpness, choose).run(hidden, init_ids, floor, foresight)
