from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.adapter.v2.ranks import Ranks
from tests.core.test_beam_search import HIDDEN, Setting, make_setting
from vllm_redrafter.adapter.v2.shared_head import best_of_all_ranks, rows_of_rank
from vllm_redrafter.core.beam_search import BeamShape, Candidates, Continuations, Noise, search
from vllm_redrafter.core.config import ReDrafterConfig

VOCAB, SHAPE, NUM_KEPT = 50, BeamShape(4, 4), 9
DRAFTERS: dict[str, dict[str, Any]] = {
    "rnn": {},
    "no rnn": {"rnn": False},
    "draft vocabulary": {"draft_vocab_size": 31},
    "tied": {"tie_lm_head": True, "exit_dim": HIDDEN},
    "tied, draft vocabulary": {"tie_lm_head": True, "exit_dim": HIDDEN, "draft_vocab_size": 31},
}


def setting_of(kind: str, seed: int) -> Setting:
    setting = make_setting(seed, vocab_size=VOCAB, **DRAFTERS[kind])
    if setting[0].config.tie_lm_head:
        setting[0].tie_head(0.5 * torch.randn(VOCAB, HIDDEN))
    return setting


def noise_for(token_ids: torch.Tensor, has_noise: bool) -> Noise | None:
    """Return noise that depends on request, depth and token."""
    noise = torch.randn(3, SHAPE.length, VOCAB, generator=torch.Generator().manual_seed(7))

    return (lambda depth: noise[:, depth, token_ids]) if has_noise else None


@pytest.fixture
def ranks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Ranks]:
    """Return ranks whose all-gather stands in the place of vLLM's."""

    def make(size: int) -> Ranks:
        ranks = Ranks(size)
        monkeypatch.setattr("vllm_redrafter.adapter.v2.shared_head.tensor_model_parallel_all_gather", ranks.all_gather)
        return ranks

    return make


@pytest.mark.parametrize("has_noise", [False, True], ids=["", "noise"])
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("seed", range(4))
def test_ranks_that_share_a_head_all_find_what_the_whole_head_finds(
    ranks_of: Callable[[int], Ranks], seed: int, kind: str, num_ranks: int, has_noise: bool
) -> None:
    ranks = ranks_of(num_ranks)
    drafter, *given = setting_of(kind, seed)
    drafted_ids = drafter.drafted_ids(torch.device("cpu"))
    noise = noise_for(drafted_ids, has_noise)
    whole = search(drafter, *given, SHAPE, NUM_KEPT, sharpness=1.25, noise=noise)

    def search_as(rank: int) -> Candidates:
        rows = rows_of_rank(drafter.config, NUM_KEPT, rank, num_ranks)
        assert rows is not None
        part = copy.deepcopy(drafter)
        part.keep_head_rows(rows)
        noise = noise_for(drafted_ids[rows.start : rows.stop], has_noise)
        choose = partial(best_of_all_ranks, first_row=rows.start)
        return search(part, *given, SHAPE, NUM_KEPT, sharpness=1.25, noise=noise, choose=choose)

    found = ranks.run(search_as)

    assert ranks.num_gathers == SHAPE.length
    for candidates in found:
        assert torch.equal(candidates.token_ids, whole.token_ids)
        assert torch.equal(candidates.parents, whole.parents)
        # four logits of some tens each, whose last digit in fp32 is worth 2e-6
        torch.testing.assert_close(candidates.log_probs, whole.log_probs, rtol=1e-6, atol=8e-6)
        assert torch.equal(candidates.log_probs, found[0].log_probs)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ties_go_to_the_first_beam_and_there_to_the_lowest_draft_id(
    ranks_of: Callable[[int], Ranks], num_ranks: int
) -> None:
    # every logit twice on every rank, so that what a rank sends ends behind a pair; the first two beams are alike
    logits = torch.arange(6.0).repeat(2)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    logits = logits.repeat(num_ranks)
    logits = torch.stack((logits, logits, logits.flip(0)))[None]
    scores = torch.tensor([[-1.0, -1.0, -1.5]])
    num_kept = 10
    totals = (logits.log_softmax(dim=-1) + scores[..., None]).flatten(1)
    expected = totals.sort(dim=-1, descending=True, stable=True).indices[:, :num_kept]

    def choose_as(rank: int) -> Continuations:
        first = rank * 12
        return best_of_all_ranks(logits[..., first : first + 12], scores, num_kept, None, 1.0, first_row=first)

    found = ranks_of(num_ranks).run(choose_as)

    for continuations in found:
        assert continuations.log_probs.unique().numel() < num_kept / 2
        assert torch.equal(continuations.beams * logits.shape[-1] + continuations.draft_ids, expected)


def test_choosing_asks_no_tensor_for_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vllm_redrafter.adapter.v2.shared_head.tensor_model_parallel_all_gather",
        lambda tensor, dim: torch.cat((tensor, tensor), dim=dim),
    )

    # there are none on this device, which refuses what would wait for a GPU
    logits, scores = torch.empty(2, 4, 30, device="meta"), torch.empty(2, 4, device="meta")
    found = best_of_all_ranks(logits, scores, NUM_KEPT, None, 1.0, first_row=30)

    assert [column.shape for column in found] == [(2, NUM_KEPT)] * 3
    assert [column.dtype for column in found] == [torch.int64, torch.int64, torch.float32]


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_rows_are_shared_out_evenly_and_in_order(num_ranks: int) -> None:
    config = ReDrafterConfig(HIDDEN, 1000, draft_vocab_size=101)

    parts = [rows_of_rank(config, NUM_KEPT, rank, num_ranks) for rank in range(num_ranks)]

    assert [row for part in parts for row in part or ()] == list(range(101))
    assert {len(part or ()) for part in parts} == {101 // num_ranks, 101 // num_ranks + 1}


@pytest.mark.parametrize(
    ("fields", "num_kept", "num_ranks"),
    [({}, 9, 1), ({"top_k": 50}, 9, 2), ({"draft_vocab_size": 17}, 9, 2), ({"vocab_size": 26}, 9, 3)],
    ids=["one rank", "top_k", "fewer drafted tokens than kept", "fewer tokens than kept"],
)
def test_a_head_that_cannot_be_shared_stays_whole(fields: dict[str, int], num_kept: int, num_ranks: int) -> None:
    config = ReDrafterConfig(**{"hidden_size": HIDDEN, "vocab_size": 1000, **fields})

    assert [rows_of_rank(config, num_kept, rank, num_ranks) for rank in range(num_ranks)] == [None] * num_ranks
