from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from vllm import SamplingParams

from tests.adapter.clocks import tell_seconds
from vllm_redrafter.adapter import foresight, searcher
from vllm_redrafter.adapter.foresight import KnownDraws
from vllm_redrafter.adapter.searcher import Searcher
from vllm_redrafter.core.beam_search import BeamShape, Candidates
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.kernels.cpu_beam_search import PackedDrafter

HIDDEN, VOCAB, DRAFTED, LENGTH = 16, 40, 24, 5


def make_searcher(width: int = 3, num_nodes: int = 7, *, in_one_call: bool = True) -> Searcher:
    torch.manual_seed(0)
    drafter = ReDrafter(ReDrafterConfig(HIDDEN, VOCAB, draft_vocab_size=DRAFTED, num_draft_layers=1)).eval()
    drafter.set_draft_vocabulary(torch.arange(DRAFTED) + 10)
    for parameter in drafter.parameters():
        parameter.data = parameter.data.bfloat16().float()  # so that the kernel rounds nothing
    embedding = nn.Embedding(VOCAB, HIDDEN)
    packed = PackedDrafter(drafter, embedding.weight.detach()) if in_one_call else None
    return Searcher(drafter, embedding, BeamShape(width, LENGTH), num_nodes, packed)


def inputs(num_requests: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_requests, HIDDEN, generator=generator), torch.arange(num_requests)


def draws(num_requests: int, sampled: list[int], **options: Any) -> KnownDraws | None:
    """Return what is known where some requests sample and the others are greedy."""
    parameters = {
        index: SamplingParams(temperature=0.9 if index in sampled else 0.0, seed=index, **options)
        for index in range(num_requests)
    }
    generators = {index: torch.Generator().manual_seed(index) for index in range(num_requests)}
    return foresight.of(generators, parameters, LENGTH, torch.arange(DRAFTED) + 10)


def same(found: Candidates, expected: Candidates) -> None:
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.parents, expected.parents)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.6}, {"top_k": 3, "min_p": 0.05}], ids=str)
@pytest.mark.parametrize(("num_requests", "sampled"), [(1, []), (1, [0]), (3, [0, 2]), (5, [0, 1, 2, 3, 4]), (20, [7])])
def test_in_one_call_is_found_what_is_found_operation_by_operation(
    num_requests: int, sampled: list[int], options: dict[str, Any]
) -> None:
    for _ in range(2):
        found = make_searcher().search(*inputs(num_requests), -math.inf, draws(num_requests, sampled, **options))

        other = make_searcher(in_one_call=False)
        same(found, other.search(*inputs(num_requests), -math.inf, draws(num_requests, sampled, **options)))


def test_both_end_at_the_floor() -> None:
    both = make_searcher(), make_searcher(in_one_call=False)
    whole = both[0].search(*inputs(2), -math.inf)
    floor = float(whole.log_probs[:, 7].max()) + 1e-3  # of depth 2

    found, expected = (each.search(*inputs(2), floor) for each in both)

    same(found, expected)
    assert found.token_ids.shape == (2, 14)


def test_it_says_how_it_searches() -> None:
    assert str(make_searcher()) == "3 x 5 tokens, in one call"
    assert str(make_searcher(in_one_call=False)) == "3 x 5 tokens, operation by operation"


@pytest.mark.parametrize(("most_seconds", "expected"), [(0.9, 1), (1.1, 4)])
def test_beams_are_searched_if_they_take_little_longer_than_one(
    most_seconds: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    def told(searcher: Searcher, num_requests: int) -> float:
        timed.append(num_requests)
        return 2.0 if searcher.shape.width == 4 else 1.0

    tell_seconds(monkeypatch, told)

    assert make_searcher(width=4).narrowed(3, most_seconds).shape == (expected, LENGTH)
    assert timed == [3, 3]


def test_one_beam_still_makes_a_tree_of_as_many_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = make_searcher()
    tell_seconds(monkeypatch, lambda searcher, num_requests: float(searcher.shape.width))

    narrow = wide.narrowed(1, 0.0)

    found = narrow.search(*inputs(1), -math.inf)
    assert str(narrow) == "1 x 5 tokens, in one call"
    assert found.token_ids.shape == (1, LENGTH * 7)
    assert found.parents.tolist() == [[depth * 7 - 7 if depth else -1 for depth in range(LENGTH) for _ in range(7)]]
    # the first depth knows but one beam
    of_all_beams = wide.search(*inputs(1), -math.inf)
    same(Candidates(*(column[:, :7] for column in found)), Candidates(*(column[:, :7] for column in of_all_beams)))


def test_times_are_measured_on_the_drafter_at_hand() -> None:
    seconds = make_searcher().seconds_beside(make_searcher(in_one_call=False), 4)

    assert all(0 < each < 10 for each in seconds)


def test_two_searches_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = make_searcher(), make_searcher(width=1)
    searched: list[Searcher] = []
    monkeypatch.setattr(Searcher, "search", lambda self, *how: searched.append(self))
    monkeypatch.setattr(
        searcher, "least_seconds", lambda *runs: [run() or float(number) for number, run in enumerate(runs)]
    )

    assert one.seconds_beside(other, 2) == [0.0, 1.0]
    assert searched == [one, other]
