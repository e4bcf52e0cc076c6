"""How good a drafter is before it serves: accuracy by offset, and acceptance length with the walk of serving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from vllm_redrafter.core.beam_search import BeamShape
from vllm_redrafter.core.drafter import Embed, ReDrafter
from vllm_redrafter.training.batch import Batch, collate, predictable
from vllm_redrafter.training.documents import Document
from vllm_redrafter.training.packing import pack
from vllm_redrafter.training.rollout import TOP_K, Objective, Rollout
from vllm_redrafter.training.simulation import Writing, mean_acceptance_length, simulate
from vllm_redrafter.training.target import FrozenTarget
from vllm_redrafter.training.transcripts import Transcript

ALL = "all"
"""Stands in the place of a source for all of them together."""


class HeldOut(NamedTuple):
    """Texts that the target wrote and no drafter has learnt from."""

    writings: list[Writing]
    embed: Embed


class Accuracy(NamedTuple):
    """How often a token of the text is among the drafter's best, given the tokens before it."""

    offset: int
    """1 for the first drafted token."""
    top1: float
    topk: float
    k: int


class Acceptance(NamedTuple):
    """What serving would get out of a tree, or of a chain where `beam_width` is 1."""

    source: str
    temperature: float
    beam_width: int
    num_nodes: int
    mean_acceptance_length: float
    """Tokens per verification."""
    by_depth: list[float]
    """Share of the verifications that accept a draft at depth 1, 2, ..."""


def hold_out(
    target: FrozenTarget, transcripts: Sequence[Transcript], fused_layers: Sequence[int] | None = None
) -> HeldOut:
    """Return transcripts with the target's view of them, for drafters that see these layers."""
    writings = []
    for each in transcripts:
        token_ids = each.token_ids.to(target.device)
        hidden = target.hidden(token_ids, fused_layers)
        writings.append(Writing(token_ids, hidden, each.num_prompt_tokens, each.source, each.seed))
    return HeldOut(writings, target.embed)


def acceptance(
    drafter: ReDrafter, held_out: HeldOut, shape: BeamShape, budgets: Sequence[int], temperature: float
) -> list[Acceptance]:
    """Return what trees of each budget of nodes yield, for all texts together and, of several sources, for each."""
    by_budget = simulate(drafter, held_out.embed, held_out.writings, shape, budgets, temperature=temperature)
    sources = sorted({each.source for each in held_out.writings})
    rows = []
    for source in [ALL, *(sources if len(sources) > 1 else [])]:
        for budget, of_budget in zip(budgets, by_budget, strict=True):
            pairs = zip(of_budget, held_out.writings, strict=True)
            steps = [taken for taken, each in pairs if source in (ALL, each.source)]
            accepted = torch.tensor([number for each in steps for number in each.num_accepted])
            by_depth = [float((accepted >= depth).float().mean()) for depth in range(1, shape.length + 1)]
            length = mean_acceptance_length(steps)
            rows.append(Acceptance(source, temperature, shape.width, budget, length, by_depth))
    return rows


def accuracies(drafter: ReDrafter, target: FrozenTarget, documents: Sequence[Document]) -> list[Accuracy]:
    """Return the accuracy of every offset that the drafter was trained for, over all target tokens."""
    objective = Objective(loss="ce", num_offsets=drafter.config.trained_draft_length, reach=0)
    rollout = Rollout(drafter, target, objective)
    num_correct = torch.zeros(objective.num_offsets, TOP_K)
    num_targets = torch.zeros(objective.num_offsets)
    longest = max(len(document.token_ids) for document in documents)
    for sequence in pack(documents, longest):
        batch = Batch(*(field.to(target.device) for field in Batch(**collate([sequence]))))
        with torch.no_grad():
            num_correct += rollout(batch, rollout.num_targets(batch)).num_correct.cpu()
        # what the draft vocabulary lacks counts as missed
        num_targets += predictable(batch, objective.num_offsets).sum(dim=(1, 2)).cpu()
    shares = (num_correct / num_targets.clamp(min=1)[:, None]).tolist()
    return [Accuracy(offset, row[0], row[-1], TOP_K) for offset, row in enumerate(shares, 1)]


def as_documents(transcripts: Sequence[Transcript]) -> list[Document]:
    """Return transcripts as documents whose targets are what the target wrote."""
    return [
        Document(each.token_ids, torch.arange(len(each.token_ids)) >= each.num_prompt_tokens, each.source)
        for each in transcripts
    ]


def to_json(offsets: Sequence[Accuracy], rows: Sequence[Acceptance]) -> dict[str, Any]:
    """Return the content of `evaluation.json`, which stands beside a drafter and which its card is made from."""
    return {
        "offsets": [each._asdict() for each in offsets],
        "acceptance": [each._asdict() for each in rows],
    }
