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

Noise = Callable[[int], torch.Tensor]
"""Foresight that only adds: given a depth from 0, returns what is added to the logits, [batch, head_size] fp32."""


class BeamShape(NamedTuple):
    """How far and how wide to search."""

    width: int
    """Beams expanded at every depth."""
    length: int
    """Tokens drafted per beam, the init token not counted (Apple's `beam_length` is one more)."""

    def check(self) -> None:
        """Refuse a shape that nothing can be searched with.

        Raises:
            ValueError: it holds a number below 1.
        """
        if self.width < 1 or self.length < 1:
            raise ValueError(f"beam shape {tuple(self)} is not usable: width and length must be at least 1")


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


Choose = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor | None, float], Continuations]
"""What `best_continuations` is an example of."""


def best_continuations(
    logits: torch.Tensor,  # [batch, beams, head_size]
    scores: torch.Tensor,  # [batch, beams]: cumulative log-probabilities, fp32
    num_kept: int,
    noise: torch.Tensor | None = None,  # [batch, head_size] fp32: added to the logits of all beams
    scale: float = 1.0,
) -> Continuations:
    """Return the best `num_kept` continuations, or all where there are fewer.

    Args:
        scale: what logits are multiplied by after the noise is added.
    """
    totals = (with_noise(logits, noise, scale).log_softmax(dim=-1) + scores[..., None]).flatten(1)
    best = totals.topk(min(num_kept, totals.shape[1]), dim=-1)
    head_size = logits.shape[-1]
    return Continuations(best.indices // head_size, best.indices % head_size, best.values)


def with_noise(
    logits: torch.Tensor,  # [batch, beams, head_size]
    noise: torch.Tensor | None,  # [batch, head_size] fp32
    scale: float,
) -> torch.Tensor:
    """Return fp32 logits with their noise, multiplied by `scale`: what continuations are ranked by."""
    values = logits.float() if noise is None else logits.float() + noise[:, None]
    return values if scale == 1 else values * scale


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
        shape.check()
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

    def extend(
        self, beams: Beams, foresight: Foresight | None = None, noise: Noise | None = None
    ) -> tuple[Candidates, Beams]:
        """Return the best continuations by one token, and the beams that the best of them are."""
        read = self._embed(beams.token_ids).to(beams.state.recurrent.dtype)
        state = self._drafter.advance(beams.state, read)
        change = None if foresight is None else partial(foresight, beams.depth)
        logits = self._drafter.processed_logits(state, change)
        added = None if noise is None else noise(beams.depth)
        best = self._choose(logits, beams.scores, self._num_kept, added, self._sharpness)
        token_ids = best.draft_ids if self._target_ids is None else self._target_ids[best.draft_ids]
        candidates = Candidates(token_ids, best.beams + beams.first, best.log_probs)

        live = slice(self._width)
        continued = best.beams[:, live, None].expand(-1, -1, state.recurrent.shape[-1])
        return candidates, Beams(
            # the recurrent state already holds the parent's token: it follows the beam that was continued
            DraftState(state.context, state.recurrent.gather(1, continued)),
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
        noise: Noise | None = None,
    ) -> Candidates:
        """Return the candidates of all depths, or of those up to the one at which no beam is above the floor.

        Args:
            floor: cumulative log-probability.
            foresight: what is made of the drafter's logits before they are multiplied; None where nothing is sampled,
                or nothing is known of it.
            noise: what is added to them instead.
        """
        beams = self.start(hidden, init_ids)
        depths: list[Candidates] = []
        for _ in range(self._length):
            candidates, beams = self.extend(beams, foresight, noise)
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
    noise: Noise | None = None,
    choose: Choose = best_continuations,
) -> Candidates:
    """Return the best continuations of `init_ids` by cumulative log-probability, in one go.

    Args:
        hidden: what `ReDrafter.start` takes, at the token before `init_ids`.
        shape: `num_candidates`, `sharpness` and `choose` too are `BeamSearch`'s.
        floor: `foresight` and `noise` too are those of `BeamSearch.run`.

    Raises:
        ValueError: the shape holds a number below 1.
    """
    search = BeamSearch(drafter, embed, shape, num_candidates, sharpness, choose)
    return search.run(hidden, init_ids, floor, foresight, noise)
