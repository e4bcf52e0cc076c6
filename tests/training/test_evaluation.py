"""What is told of a drafter is what serving will see of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.training.small import VOCAB, make_documents, make_drafter, make_target
from vllm_redrafter.core.beam_search import BeamShape
from vllm_redrafter.training import evaluation
from vllm_redrafter.training.documents import Document
from vllm_redrafter.training.evaluation import acceptance, accuracies, as_documents, hold_out, to_json
from vllm_redrafter.training.simulation import Steps, mean_acceptance_length, simulate
from vllm_redrafter.training.transcripts import Transcript, transcribe


def transcripts() -> list[Transcript]:
    return [
        Transcript(document.token_ids, 3, source)
        for document, source in zip(make_documents(20, 14, 9), ("code", "chat", "code"), strict=True)
    ]


def test_acceptance_is_told_for_all_texts_and_for_every_source() -> None:
    target, drafter = make_target(), make_drafter()
    held_out, shape = hold_out(target, transcripts()), BeamShape(3, 4)

    rows = acceptance(drafter, held_out, shape, [2, 8], temperature=0.0)

    assert [(row.source, row.num_nodes) for row in rows] == [
        (source, num_nodes) for source in ("all", "chat", "code") for num_nodes in (2, 8)
    ]
    (taken,) = simulate(drafter, target.embed, held_out.writings, shape, [8], temperature=0.0)
    row = next(row for row in rows if (row.source, row.num_nodes) == ("chat", 8))
    assert row.mean_acceptance_length == taken[1].mean_acceptance_length
    assert row.mean_acceptance_length == pytest.approx(1 + sum(row.by_depth), abs=1e-6)
    assert row.by_depth == sorted(row.by_depth, reverse=True)
    assert rows[1].mean_acceptance_length == mean_acceptance_length(taken)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_held_against_the_trees_of_their_temperature(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    asked = []

    def watched(*arguments: Any, **how: Any) -> list[list[Steps]]:
        asked.append(([each.seed for each in arguments[2]], how["temperature"]))
        return simulate(*arguments, **how)

    monkeypatch.setattr(evaluation, "simulate", watched)
    target = make_target()
    written = transcribe(target, transcripts(), 8, temperature=temperature)
    acceptance(make_drafter(), hold_out(target, written), BeamShape(2, 3), [4], temperature)

    assert asked == [([each.seed for each in written], temperature)]
    assert all((each.seed is None) == (temperature == 0) for each in written)


def test_a_single_source_is_told_once() -> None:
    target, drafter = make_target(), make_drafter()

    rows = acceptance(drafter, hold_out(target, transcripts()[1:2]), BeamShape(2, 3), [4], temperature=0.0)

    assert [row.source for row in rows] == ["all"]


def test_accuracy_is_weighed_by_tokens_and_misses_what_cannot_be_drafted() -> None:
    target, drafter = make_target(), make_drafter(draft_vocab_size=VOCAB // 2, trained_draft_length=2)
    documents = make_documents(18, 6, 11)
    ids = drafter.target_ids()
    assert ids is not None
    hits, seen = torch.zeros(2, 2), torch.zeros(2)
    for document in documents:
        hidden = target.hidden(document.token_ids)
        for start in range(len(document.token_ids) - 2):
            state = drafter.start(hidden[start])
            for offset in range(min(2, len(document.token_ids) - 2 - start)):
                state = drafter.advance(state, target.embed(document.token_ids[start + 1 + offset]))
                place = start + 2 + offset
                best = ids[drafter.logits(state).topk(5).indices].tolist()
                if document.is_target[place]:
                    seen[offset] += 1
                    token = int(document.token_ids[place])
                    hits[offset] += torch.tensor([best[0] == token, token in best])

    found = accuracies(drafter, target, documents)

    assert [(row.offset, row.k) for row in found] == [(1, 5), (2, 5)]
    assert hits[:, 1].min() > 0
    for row, expected in zip(found, hits / seen[:, None], strict=True):
        assert [row.top1, row.topk] == pytest.approx(expected.tolist())


def test_a_transcript_teaches_what_the_target_wrote() -> None:
    (document,) = as_documents([Transcript(torch.arange(6), 4, "code")])

    assert isinstance(document, Document)
    assert document.is_target.tolist() == [False] * 4 + [True] * 2
    assert document.source == "code"


def test_what_is_written_for_the_card_says_every_offset_and_every_budget() -> None:
    target, drafter = make_target(), make_drafter()
    rows = acceptance(drafter, hold_out(target, transcripts()), BeamShape(2, 3), [4], temperature=1.0)

    told = to_json(accuracies(drafter, target, make_documents(12)), rows)

    assert [each["offset"] for each in told["offsets"]] == [1, 2, 3, 4]
    assert {each["temperature"] for each in told["acceptance"]} == {1.0}
    assert {"source", "num_nodes", "mean_acceptance_length"} <= told["acceptance"][0].keys()
