"""How many tokens a verification step would yield, read off texts of the target without running it again.

What a step accepts is decided by the text that the target goes on to write: from position t the drafter's tree is held
against the tokens that follow, and the walk that serving does goes exactly as far as the tree contains them. Given a
text that the target wrote, greedily or sampled, the steps that an engine would take over it are therefore known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from vllm_redrafter.core.beam_search import SHARPNESS, BeamShape, Foresight, search
from vllm_redrafter.core.drafter import Embed, ReDrafter
from vllm_redrafter.core.noise import draw_seeds, gumbel

_POSITIONS_PER_SEARCH = 256


class Writing(NamedTuple):
    """A text of the target with the target's view of it."""

    token_ids: torch.Tensor  # [length]: prompt and answer
    hidden: torch.Tensor  # [length, input_size]: what `ReDrafter.start` takes
    num_prompt_tokens: int
    source: str
    seed: int | None = None
    """Of the `NoisySampler` that drew the answer; None where none did."""


class Steps(NamedTuple):
    """What the verifications of a text accept."""

    num_accepted: list[int]
    """Drafts accepted, step by step."""

    @property
    def mean_acceptance_length(self) -> float:
        """Mean tokens per step: the accepted drafts and one more."""
        return 1 + sum(self.num_accepted) / max(1, len(self.num_accepted))


@torch.inference_mode()
def accepted_ranks(
    drafter: ReDrafter,
    embed: Embed,
    writing: Writing,
    shape: BeamShape,
    most_nodes: int,
    *,
    temperature: float,
) -> torch.Tensor:
    """Return, by position and depth, the rank of the node that the text goes through, [length - 2, draft_length].

    Row t stands for a step whose root is token t + 1. A tree of N nodes holds the nodes of rank below N, so it accepts
    as many tokens as its row has entries below N; where the text leaves all trees the entry is `most_nodes`. Rows whose
    drafts lie in the prompt mean nothing.

    Args:
        temperature: that the answer was written at; 0 for the target's most probable tokens.
    """
    text = writing.token_ids
    # behind the end of the text stand tokens that nothing matches
    beyond = functional.pad(text, (0, shape.length), value=-1)
    seeds = _seeds_by_position(writing, shape.length) if temperature else None

    def foresight_from(seeds: torch.Tensor) -> Foresight:  # [positions + length - 1]
        noise = temperature * gumbel(seeds, drafter.drafted_ids(seeds.device))
        return lambda depth, logits: logits + noise[depth : depth + len(logits), None]

    rows = []
    num_rows = len(text) - 2
    # a width of 1 asks for a chain; with more, the runners-up of every depth are candidates too
    num_candidates = most_nodes if shape.width > 1 else 1
    for start in range(0, num_rows, _POSITIONS_PER_SEARCH):
        stop = min(start + _POSITIONS_PER_SEARCH, num_rows)
        hidden = writing.hidden[start:stop].to(next(drafter.parameters()).dtype)
        candidates = search(
            drafter,
            embed,
            hidden,
            text[start + 1 : stop + 1],
            shape,
            num_candidates,
            sharpness=1.0 if seeds is None and temperature else SHARPNESS,
            foresight=None if seeds is None else foresight_from(seeds[start + 2 : stop + 1 + shape.length]),
        )
        order = candidates.log_probs.argsort(dim=1, descending=True, stable=True)
        places = torch.arange(order.shape[1], device=order.device)
        ranks = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
        real = candidates.log_probs > float("-inf")
        node = torch.full_like(order[:, :1], -1)  # the root
        found = torch.ones_like(node[:, 0], dtype=torch.bool)
        columns = []
        for depth in range(shape.length):
            following = beyond[start + 2 + depth : stop + 2 + depth, None]
            matches = (candidates.parents == node) & (candidates.token_ids == following) & real & found[:, None]
            found = matches.any(dim=1)
            node = matches.int().argmax(dim=1, keepdim=True)
            columns.append(ranks.gather(1, node)[:, 0].masked_fill(~found, most_nodes).clamp(max=most_nodes))
        rows.append(torch.stack(columns, dim=1))
    return torch.cat(rows)


def _seeds_by_position(writing: Writing, draft_length: int) -> torch.Tensor | None:  # [length + draft_length]
    """Return the seed of every token's noise, also of those that could be drafted behind the end."""
    if writing.seed is None:
        return None
    num_drawn = len(writing.token_ids) - writing.num_prompt_tokens + draft_length
    seeds = draw_seeds(torch.Generator().manual_seed(writing.seed), num_drawn)
    return functional.pad(seeds, (writing.num_prompt_tokens, 0)).to(writing.token_ids.device)


def simulate(ranks: torch.Tensor, num_prompt_tokens: int, num_nodes: int) -> Steps:
    """Return the steps that serving takes over a text with trees of `num_nodes` nodes, given its `accepted_ranks`.

    The first token after the prompt is the prompt's own, so the first step has it as its root. Drafts behind the end of
    the text are not accepted.
    """
    accepted = (ranks < num_nodes).sum(dim=1).tolist()
    steps = []
    position = num_prompt_tokens - 1
    while position < len(accepted):
        steps.append(accepted[position])
        position += accepted[position] + 1
    return Steps(steps)


def mean_acceptance_length(steps: Sequence[Steps]) -> float:
    """Return the mean over the steps of all texts."""
    return Steps([number for each in steps for number in each.num_accepted]).mean_acceptance_length
