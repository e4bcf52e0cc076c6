from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from vllm import SamplingParams

from tests.adapter.clocks import tell_seconds
from vllm_redrafter.adapter import foresight, int8, searcher
from vllm_redrafter.adapter.foresight import KnownDraws
from vllm_redrafter.adapter.searcher import Searcher
from vllm_redrafter.core.beam_search import BeamShape, Candidates
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

HIDDEN, VOCAB, DRAFTED, LENGTH = 16, 40, 24, 5


def make_searcher(length: int = LENGTH, width: int = 3, num_nodes: int = 7) -> Searcher:
    torch.manual_seed(0)
    drafter = ReDrafter(ReDrafterConfig(HIDDEN, VOCAB, draft_vocab_size=DRAFTED, num_draft_layers=1)).eval()
    drafter.set_draft_vocabulary(torch.arange(DRAFTED) + 10)
    return Searcher(drafter, torch.float32, nn.Embedding(VOCAB, HIDDEN), BeamShape(width, length), num_nodes)


def compiled(monkeypatch: pytest.MonkeyPatch, num_requests: int, *, truncates: bool = False, **shape: int) -> Searcher:
    """Return a searcher that has compiled, whatever its clock would have said."""
    torch._dynamo.reset()
    seconds = Searcher.seconds
    told = iter([2.0, 1.0])
    monkeypatch.setattr(Searcher, "seconds", lambda self, *case, **how: (seconds(self, *case, **how), next(told))[1])
    found = make_searcher(**shape)
    found.compile(num_requests, truncates=truncates)
    monkeypatch.setattr(searcher, "_WHILE_SERVING", "fail_on_recompile")
    return found


@torch.inference_mode()  # as a step of vLLM is
def inputs(num_requests: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_requests, HIDDEN, generator=generator), torch.arange(num_requests)


@torch.inference_mode()
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
    torch.testing.assert_close(found.log_probs, expected.log_probs)


def count_runs(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of requests of each search that the program makes."""
    ((case, program),) = searcher._programs.items()
    runs: list[int] = []
    counted = {case: lambda hidden, *how: (runs.append(len(hidden)), program(hidden, *how))[1]}
    monkeypatch.setattr(searcher, "_programs", counted)
    return runs


@pytest.mark.parametrize(
    ("sampled", "options"),
    [([], {}), ([0], {}), ([0], {"top_p": 0.6}), ([0], {"top_k": 3, "min_p": 0.05})],
    ids=["greedy", "sampled", "top_p", "top_k and min_p"],
)
def test_for_one_request_a_compiled_search_finds_what_the_other_does(
    sampled: list[int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = compiled(monkeypatch, 1, truncates=bool(options))
    runs = count_runs(fast, monkeypatch)

    for _ in range(2):
        found = fast.search(*inputs(1), -math.inf, draws(1, sampled, **options))
        same(found, make_searcher().search(*inputs(1), -math.inf, draws(1, sampled, **options)))

    assert runs == [1, 1]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.6}], ids=["all tokens", "top_p"])
def test_for_several_requests_one_program_serves_any_number(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = compiled(monkeypatch, searcher.SEVERAL, truncates=bool(options))
    runs = count_runs(fast, monkeypatch)

    for number, sampled in [(2, [1]), (3, [0, 2]), (searcher.SEVERAL, [1]), (5, [0, 1, 2, 3, 4]), (16, [7])]:
        found = fast.search(*inputs(number), -math.inf, draws(number, sampled, **options))
        same(found, make_searcher().search(*inputs(number), -math.inf, draws(number, sampled, **options)))
    found = fast.search(*inputs(4), -math.inf)  # greedy
    same(found, make_searcher().search(*inputs(4), -math.inf))

    assert runs == [2, 3, 4, 5, 16] + ([] if options else [4])


def test_a_compiled_search_may_read_packed_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Searcher, "scoring_seconds", lambda self, number: 2.0 - ("packed" in str(self)))
    plain = make_searcher
    monkeypatch.setitem(globals(), "make_searcher", lambda **shape: plain(**shape).packed(searcher.SEVERAL))
    fast = compiled(monkeypatch, searcher.SEVERAL)
    runs = count_runs(fast, monkeypatch)

    for number in (2, 5, 16):
        same(fast.search(*inputs(number), -math.inf), plain().search(*inputs(number), -math.inf))

    assert runs == [2, 5, 16]
    assert str(fast) == "3 x 5 tokens, weights in 32 bits, packed, compiled"


def test_packed_matrices_are_read_where_that_is_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = make_searcher()
    for seconds, is_packed in ((1.0, True), (3.0, False)):
        monkeypatch.setattr(
            Searcher, "scoring_seconds", lambda self, number, packed=seconds: packed if "packed" in str(self) else 2.0
        )

        assert (stock.packed(searcher.SEVERAL) is not stock) == is_packed


def test_what_no_program_is_made_for_is_searched_for_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(monkeypatch, searcher.SEVERAL)
    runs = count_runs(fast, monkeypatch)

    # one request; too many; leaving tokens out is more than adding noise, and has a program of its own
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


def test_programs_of_many_engines_do_not_use_up_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    warnings: list[str] = []
    monkeypatch.setattr(searcher.logger, "warning", lambda message, *args: warnings.append(message % args))

    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (1, 2, 3):
            make_searcher(width=width).compile(1)

    assert warnings == []


def test_a_search_that_does_not_compile_goes_on_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_searcher()
    warnings: list[str] = []
    monkeypatch.setattr(searcher.logger, "warning", lambda message, *args: warnings.append(message % args))

    def refuse(*arguments: object) -> None:
        raise torch._dynamo.exc.Unsupported("no such thing\nat line 3")

    monkeypatch.setattr(searcher, "_compiled", lambda function: refuse)

    found.compile(1)

    same(found.search(*inputs(1), -math.inf), make_searcher().search(*inputs(1), -math.inf))
    assert warnings == ["Drafts are searched for uncompiled, which takes longer: torch.compile says 'no such thing'"]


def test_a_program_that_is_slower_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_searcher()
    told = iter([1.0, 1.0])
    monkeypatch.setattr(Searcher, "seconds", lambda self, *case, **how: next(told))

    found.compile(1)

    assert found._programs == {}


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

    found = wide.narrowed(1, 0.0).search(*inputs(1), -math.inf)

    assert found.token_ids.shape == (1, LENGTH * 7)
    assert found.parents.tolist() == [[depth * 7 - 7 if depth else -1 for depth in range(LENGTH) for _ in range(7)]]
    # the first depth knows but one beam
    same(Candidates(*(column[:, :7] for column in found)), Candidates(*(column[:, :7] for column in search_of(wide))))


def search_of(searcher: Searcher) -> Candidates:
    return searcher.search(*inputs(1), -math.inf)


def told_product_seconds(monkeypatch: pytest.MonkeyPatch, compiled_seconds: float, uncompiled_seconds: float) -> None:
    """Let the clock say what all products take; one row's are timed first."""
    told = itertools.cycle([compiled_seconds, uncompiled_seconds])
    monkeypatch.setattr(searcher, "median_seconds", lambda function: (function(), next(told))[1])


@pytest.mark.parametrize(("compiled_seconds", "is_used"), [(1.0, True), (2.0, False)])
def test_products_of_one_row_are_compiled_where_that_is_faster(
    compiled_seconds: float, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    found = make_searcher(width=1)
    told_product_seconds(monkeypatch, compiled_seconds, 2.0)
    assert (found._one_row is not None) is is_used
    monkeypatch.setattr(Searcher, "seconds", lambda self, *case, **how: 0.0 if self._programs else 1.0)

    found.compile(1)

    searched = found.search(*inputs(1), -math.inf)
    expected = make_searcher(width=1).search(*inputs(1), -math.inf)
    assert torch.equal(searched.token_ids[:, 0], expected.token_ids[:, 0])
    torch.testing.assert_close(searched.log_probs, expected.log_probs, rtol=0.0, atol=0.05)
    # rounded weights show that it is they that were used
    assert bool((searched.log_probs - expected.log_probs).abs().max() > 1e-4) is is_used
    assert ("one row in 16" in str(found)) is is_used


def test_one_row_is_only_looked_at_for_one_beam_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searcher.one_row, "for_one_row", pytest.fail)
    monkeypatch.setattr(searcher, "_compiled", lambda function: function)

    make_searcher(width=3).compile(1)
    make_searcher(width=1).compile(searcher.SEVERAL)


def test_products_of_one_row_that_do_not_compile_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(searcher.logger, "warning", lambda message, *args: warnings.append(message % args))

    def refuse(state: object) -> None:
        raise torch._dynamo.exc.Unsupported("no such thing")

    monkeypatch.setattr(searcher.torch, "compile", lambda function, **how: refuse)

    assert make_searcher(width=1)._one_row is None
    assert warnings == ["The drafter's products are not compiled: torch.compile says 'no such thing'"]


@pytest.mark.parametrize(
    ("num_requests", "will_compile", "expected"), [(1, True, 1), (1, False, 4), (searcher.SEVERAL, True, 4)]
)
def test_beams_must_be_worth_what_one_row_saves(
    num_requests: int, will_compile: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_product_seconds(monkeypatch, 0.5, 1.0)  # saved: half a second
    tell_seconds(monkeypatch, lambda searcher, number: 2.0 if searcher.shape.width == 4 else 1.0)

    found = make_searcher(width=4).narrowed(num_requests, 1.4, will_compile=will_compile)

    assert found.shape.width == expected


def test_times_are_measured_on_the_drafter_at_hand() -> None:
    found = make_searcher()
    small = Searcher(int8.quantized(found.drafter), torch.bfloat16, nn.Embedding(VOCAB, HIDDEN), found.shape, 7)

    for each in (found, small):
        assert 0 < each.seconds(1) < 10
        assert 0 < each.scoring_seconds(4) < 10


def test_two_searches_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = make_searcher()
    narrow = wide.one_beam(2)
    searched: list[Searcher] = []
    monkeypatch.setattr(Searcher, "search", lambda self, *how: searched.append(self))
    monkeypatch.setattr(
        searcher, "least_seconds", lambda *runs: [run() or float(number) for number, run in enumerate(runs)]
    )

    assert wide.seconds_beside(narrow, 2) == [0.0, 1.0]
    assert searched == [wide, narrow]
