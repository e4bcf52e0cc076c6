from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from vllm import SamplingParams

from vllm_redrafter.adapter import foresight, int8, searcher
from vllm_redrafter.adapter.config import ReDrafterOptions
from vllm_redrafter.adapter.foresight import KnownDraws
from vllm_redrafter.adapter.searcher import Searcher
from vllm_redrafter.core.beam_search import Candidates
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

HIDDEN, VOCAB, DRAFTED, LENGTH = 16, 40, 24, 5


def make_searcher(length: int = LENGTH, width: int = 3, num_nodes: int = 7) -> Searcher:
    torch.manual_seed(0)
    drafter = ReDrafter(ReDrafterConfig(HIDDEN, VOCAB, draft_vocab_size=DRAFTED, num_draft_layers=1)).eval()
    drafter.set_draft_vocabulary(torch.arange(DRAFTED) + 10)
    options = ReDrafterOptions("unused", num_nodes, width, length, "auto")
    return Searcher(drafter, torch.float32, nn.Embedding(VOCAB, HIDDEN), options)


def compiled(monkeypatch: pytest.MonkeyPatch, num_requests: int, **shape: int) -> Searcher:
    """Return a searcher that has compiled, whatever its clock would have said."""
    torch._dynamo.reset()
    seconds = Searcher.seconds
    told = iter([2.0, 1.0])
    monkeypatch.setattr(Searcher, "seconds", lambda self, number: (seconds(self, number), next(told))[1])
    found = make_searcher(**shape)
    found.compile(num_requests)
    monkeypatch.setattr(searcher, "_WHILE_SERVING", "fail_on_recompile")
    return found


@torch.inference_mode()  # as a step of vLLM is
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
    return foresight.of(generators, num_requests, parameters, LENGTH, torch.arange(DRAFTED) + 10)


def same(found: Candidates, expected: Candidates) -> None:
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.parents, expected.parents)
    torch.testing.assert_close(found.log_probs, expected.log_probs)


def count_runs(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of requests of each search that the program makes."""
    ((several, program),) = searcher._programs.items()
    runs: list[int] = []
    counted = {several: lambda hidden, *how: (runs.append(len(hidden)), program(hidden, *how))[1]}
    monkeypatch.setattr(searcher, "_programs", counted)
    return runs


@pytest.mark.parametrize("sampled", [[], [0]], ids=["greedy", "sampled"])
def test_for_one_request_a_compiled_search_finds_what_the_other_does(
    sampled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = compiled(monkeypatch, 1)
    runs = count_runs(fast, monkeypatch)

    for _ in range(2):
        found = fast.search(*inputs(1), -math.inf, draws(1, sampled))
        same(found, make_searcher().search(*inputs(1), -math.inf, draws(1, sampled)))

    assert runs == [1, 1]


def test_for_several_requests_one_program_serves_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(monkeypatch, searcher.SEVERAL)
    runs = count_runs(fast, monkeypatch)

    for number, sampled in [(2, []), (3, [0, 2]), (searcher.SEVERAL, [1]), (5, [0, 1, 2, 3, 4]), (16, [7])]:
        found = fast.search(*inputs(number), -math.inf, draws(number, sampled))
        same(found, make_searcher().search(*inputs(number), -math.inf, draws(number, sampled)))

    assert runs == [2, 3, 4, 5, 16]


def test_what_no_program_is_made_for_is_searched_for_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(monkeypatch, searcher.SEVERAL)
    runs = count_runs(fast, monkeypatch)

    # one request; too many; leaving tokens out is more than adding noise
    for number, options in [(1, {}), (17, {}), (3, {"top_k": 3})]:
        found = fast.search(*inputs(number), -math.inf, draws(number, [0], **options))
        same(found, make_searcher().search(*inputs(number), -math.inf, draws(number, [0], **options)))

    assert runs == []


def test_while_serving_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(monkeypatch, searcher.SEVERAL)
    monkeypatch.undo()
    hidden, init_ids = inputs(3)
    of_another_layout = torch.stack((hidden, hidden), dim=2)[..., 0]

    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = fast.search(of_another_layout, init_ids, -math.inf)

    same(found, make_searcher().search(hidden, init_ids, -math.inf))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("num_requests", [1, searcher.SEVERAL])
def test_a_compiled_search_ends_after_half_of_the_depths_where_the_rest_does_not_pay(
    num_requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = compiled(monkeypatch, num_requests)
    whole = make_searcher().search(*inputs(num_requests), -math.inf)
    best = whole.log_probs[:, 14:21].max()  # of depth 3

    ended = fast.search(*inputs(num_requests), float(best) + 1e-3)
    gone_on = fast.search(*inputs(num_requests), float(best) - 1e-3)

    same(ended, Candidates(*(column[:, :21] for column in whole)))
    same(gone_on, whole)


@pytest.mark.parametrize("length", [1, 2])
def test_a_compiled_search_may_be_short(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(monkeypatch, 1, length=length)

    same(fast.search(*inputs(1), -math.inf), make_searcher(length).search(*inputs(1), -math.inf))


def test_a_program_that_is_slower_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_searcher()
    told = iter([1.0, 1.0])
    monkeypatch.setattr(Searcher, "seconds", lambda self, num_requests: next(told))

    found.compile(1)

    assert found._programs == {}


def test_times_are_measured_on_the_drafter_at_hand() -> None:
    found = make_searcher()
    small = Searcher(
        int8.quantized(found.drafter),
        torch.bfloat16,
        nn.Embedding(VOCAB, HIDDEN),
        ReDrafterOptions("", 7, 3, 5, "auto"),
    )

    for each in (found, small):
        assert 0 < each.seconds(1) < 10
        assert 0 < each.scoring_seconds(4) < 10
