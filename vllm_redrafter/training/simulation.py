"""How many tokens a verification step would yield, read off texts of the target without running it again.

What a step accepts is decided by the text that the target goes on to write: from position t the drafter's tree is held
against the tokens that follow, and the walk that serving does goes exactly as far as the tree contains them. Given a
text that the target wrote, greedily or sampled, the steps that an engine would take over it are therefore known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from vllm_redrafter.core.beam_search import SHARPNESS, BeamShape, search
from vllm_redrafter.core.drafter import Embed, ReDrafter
from vllm_redrafter.core.noise import draw_seeds, gumbel

_ROOTS_PER_SEARCH = 256


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
def simulate(
    drafter: ReDrafter,
    embed: Embed,
    writings: Sequence[Writing],
    shape: BeamShape,
    budgets: Sequence[int],
    *,
    temperature: float,
) -> list[list[Steps]]:
    """Return, by budget and then by text, the steps that serving takes with trees of so many nodes.

    The first token after the prompt is the prompt's own, so the first step has it as its root. Drafts behind the end of
    a text are not accepted. Only what a step starts from is searched, in all texts at once.

    Args:
        shape: of the search; a width of 1 asks for chains.
        temperature: that the texts were written at; 0 for the target's most probable tokens.
    """
    texts = [_Text.of(each, shape.length, is_sampled=temperature > 0) for each in writings]
    walks = [[_Walk(text, each.num_prompt_tokens - 1, []) for text, each in enumerate(writings)] for _ in budgets]
    ranks: dict[_Root, list[int]] = {}
    while True:
        going = [
            (num_nodes, walk)
            for num_nodes, of_budget in zip(budgets, walks, strict=True)
            for walk in of_budget
            if walk.position < texts[walk.text].num_roots
        ]
        if not going:
            return [[Steps(walk.num_accepted) for walk in of_budget] for of_budget in walks]
        # budgets come through the same places, not always in the same round
        new = sorted({walk.root for _, walk in going} - ranks.keys())
        for part in _batches(new, texts):
            found = _accepted_ranks(drafter, embed, texts, part, shape, max(budgets), temperature)
            ranks |= zip(part, found.tolist(), strict=True)
        for num_nodes, walk in going:
            walk.accept(sum(rank < num_nodes for rank in ranks[walk.root]))


class _Root(NamedTuple):
    """Where a step starts: at the token behind `position`, with the target's view of that position."""

    text: int
    position: int


def _batches(roots: Sequence[_Root], texts: Sequence[_Text]) -> Iterator[list[_Root]]:
    """Yield roots as they are searched together: those whose noise is known are ranked in another way."""
    for is_known in (False, True):
        alike = [root for root in roots if (texts[root.text].seeds is not None) == is_known]
        for start in range(0, len(alike), _ROOTS_PER_SEARCH):
            yield alike[start : start + _ROOTS_PER_SEARCH]


@dataclass
class _Walk:
    """The steps over one text so far, and where the next one starts."""

    text: int
    position: int
    num_accepted: list[int]

    @property
    def root(self) -> _Root:
        return _Root(self.text, self.position)

    def accept(self, number: int) -> None:
        self.num_accepted.append(number)
        self.position += number + 1


class _Text(NamedTuple):
    """A writing, with as much behind its end as is drafted from its last token."""

    hidden: torch.Tensor  # [length, input_size]
    token_ids: torch.Tensor  # [length + draft_length]: behind the end stand tokens that nothing matches
    seeds: torch.Tensor | None  # [length + draft_length]: of every token's noise, where that is known

    @classmethod
    def of(cls, writing: Writing, draft_length: int, *, is_sampled: bool) -> _Text:
        """Return a writing with what follows; its noise counts where it was sampled."""
        token_ids = functional.pad(writing.token_ids, (0, draft_length), value=-1)
        seeds = None
        if is_sampled and writing.seed is not None:
            num_drawn = len(token_ids) - writing.num_prompt_tokens
            seeds = draw_seeds(torch.Generator().manual_seed(writing.seed), num_drawn)
            seeds = functional.pad(seeds, (writing.num_prompt_tokens, 0)).to(token_ids.device)
        return cls(writing.hidden, token_ids, seeds)

    @property
    def num_roots(self) -> int:
        """How many positions have a token to start from behind them, and another one to draft."""
        return len(self.hidden) - 2


def _accepted_ranks(
    drafter: ReDrafter,
    embed: Embed,
    texts: Sequence[_Text],
    roots: Sequence[_Root],
    shape: BeamShape,
    most_nodes: int,
    temperature: float,
) -> torch.Tensor:
    """Return, by root and depth, the rank of the node that the text goes through, [roots, draft_length].

    A tree of N nodes holds the nodes of rank below N, so it accepts as many tokens as its row has entries below N;
    where the text leaves all trees the entry is `most_nodes`. The noise is known of all roots or of none.
    """
    drafted = [slice(position + 2, position + 2 + shape.length) for _, position in roots]
    following = torch.stack([texts[root.text].token_ids[part] for root, part in zip(roots, drafted, strict=True)])
    hidden = torch.stack([texts[text].hidden[position] for text, position in roots])
    init_ids = torch.stack([texts[text].token_ids[position + 1] for text, position in roots])
    seeds = [texts[root.text].seeds for root in roots]
    known = [each[part] for each, part in zip(seeds, drafted, strict=True) if each is not None]
    foresight = None
    if known:
        noise_seeds, drafted_ids = torch.stack(known), drafter.drafted_ids(following.device)

        def foresight(depth: int, logits: torch.Tensor) -> torch.Tensor:
            return logits + temperature * gumbel(noise_seeds[:, depth, None], drafted_ids)

    candidates = search(
        drafter,
        embed,
        hidden.to(next(drafter.parameters()).dtype),
        init_ids,
        shape,
        # a width of 1 asks for a chain; with more, the runners-up of every depth are candidates too
        most_nodes if shape.width > 1 else 1,
        sharpness=1.0 if temperature and not known else SHARPNESS,
        foresight=foresight,
    )
    order = candidates.log_probs.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device)
    ranks = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
    real = candidates.log_probs > float("-inf")
    node = torch.full_like(order[:, :1], -1)  # the root
    found = torch.ones_like(node[:, 0], dtype=torch.bool)
    columns = []
    for depth in range(shape.length):
        token_ids = following[:, depth, None]
        matches = (candidates.parents == node) & (candidates.token_ids == token_ids) & real & found[:, None]
        found = matches.any(dim=1)
        node = matches.int().argmax(dim=1, keepdim=True)
        columns.append(ranks.gather(1, node)[:, 0].masked_fill(~found, most_nodes).clamp(max=most_nodes))
    return torch.stack(columns, dim=1)


def mean_acceptance_length(steps: Sequence[Steps]) -> float:
    """Return the mean over the steps of all texts."""
    return Steps([number for each in steps for number in each.num_accepted]).mean_acceptance_length
