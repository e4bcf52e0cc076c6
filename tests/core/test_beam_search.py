from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.core import naive
from vllm_redrafter.core.beam_search import BeamShape, Candidates, search
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

HIDDEN = 8
# float32 sums of up to 6 log-probabilities against float64
ROUNDING = 1e-4

Setting = tuple[ReDrafter, nn.Embedding, torch.Tensor, torch.Tensor]


def make_setting(seed: int, batch_size: int = 3, vocab_size: int = 20, **config: object) -> Setting:
    """Return a sharp random drafter, an embedding, hidden states and init tokens."""
    torch.manual_seed(seed)
    drafter = ReDrafter(ReDrafterConfig(**{"hidden_size": HIDDEN, "vocab_size": vocab_size, **config})).eval()
    for parameter in drafter.parameters():
        nn.init.normal_(parameter.requires_grad_(False), std=0.5)
    if config.get("draft_vocab_size"):
        drafter.set_draft_vocabulary(torch.randperm(vocab_size)[: config["draft_vocab_size"]].sort().values)
    embedding = nn.Embedding(vocab_size, HIDDEN).requires_grad_(False)
    return drafter, embedding, torch.randn(batch_size, HIDDEN), torch.randint(vocab_size, (batch_size,))


def by_prefix(candidates: Candidates, row: int) -> dict[naive.Prefix, float]:
    """Return a row's candidates that have a probability, checking that parents stand first and no prefix twice."""
    columns = [column[row].tolist() for column in candidates]
    found: list[naive.Prefix] = []
    out: dict[naive.Prefix, float] = {}
    for token_id, parent, log_prob in zip(*columns, strict=True):
        assert parent < len(found)
        prefix = (*(found[parent] if parent >= 0 else ()), token_id)
        found.append(prefix)
        if log_prob > float("-inf"):
            assert prefix not in out
            out[prefix] = log_prob
    return out


def naive_search(setting: Setting, row: int, shape: BeamShape, num_candidates: int | None = None) -> naive.Search:
    drafter, embedding, hidden, init_ids = setting
    log_probs = naive.drafter_log_probs(drafter, embedding.weight, hidden[row], int(init_ids[row]))
    expected = naive.beam_search(log_probs, *shape, num_candidates)
    assert expected.smallest_gap > 1e-6, "a seed whose choices float32 may turn round compares nothing"
    return expected


def assert_same(found: dict[naive.Prefix, float], expected: dict[naive.Prefix, float]) -> None:
    assert set(found) == set(expected)
    for prefix, log_prob in expected.items():
        assert found[prefix] == pytest.approx(log_prob, abs=ROUNDING)


@pytest.mark.parametrize("length", [1, 2, 3, 6])
@pytest.mark.parametrize("width", [1, 2, 3, 8, 25, 60])
def test_the_search_finds_what_a_search_in_loops_finds(width: int, length: int) -> None:
    setting = make_setting(seed=width * 10 + length)
    shape = BeamShape(width, length)

    candidates = search(*setting, shape)

    for row in range(3):
        expected = naive_search(setting, row, shape)
        assert_same(by_prefix(candidates, row), {k: v for depth in expected.candidates for k, v in depth.items()})


@pytest.mark.parametrize(
    "config",
    [
        {"rnn": False},
        {"exit_dim": HIDDEN},
        {"num_draft_layers": 0},
        {"top_k": 5},
        {"draft_vocab_size": 6},
        {"draft_vocab_size": 12, "top_k": 3},
    ],
)
@pytest.mark.parametrize("num_candidates", [None, 9])
def test_every_kind_of_drafter_is_searched_alike(config: dict[str, object], num_candidates: int | None) -> None:
    setting = make_setting(seed=5, **config)
    shape = BeamShape(4, 3)

    candidates = search(*setting, shape, num_candidates)

    for row in range(3):
        expected = naive_search(setting, row, shape, num_candidates)
        assert_same(by_prefix(candidates, row), {k: v for depth in expected.candidates for k, v in depth.items()})


def test_candidates_stand_best_first_at_every_depth() -> None:
    candidates = search(*make_setting(seed=1), BeamShape(4, 5), 7)

    assert candidates.token_ids.shape == (3, 35)
    assert (candidates.log_probs.view(3, 5, 7).diff(dim=2) <= 0).all()
    assert candidates.log_probs.dtype == torch.float32


def test_all_continuations_of_a_search_wide_enough_make_a_distribution() -> None:
    vocab_size, length = 5, 3
    setting = make_setting(seed=2, vocab_size=vocab_size)

    candidates = search(*setting, BeamShape(vocab_size**length, length))

    sizes = [vocab_size**depth for depth in range(1, length + 1)]
    for depth in candidates.log_probs.split(sizes, dim=1):
        torch.testing.assert_close(depth.exp().sum(dim=1), torch.ones(3), rtol=0, atol=1e-4)


def test_rows_of_a_batch_are_searched_independently() -> None:
    drafter, embedding, hidden, init_ids = make_setting(seed=3, batch_size=5)
    shape = BeamShape(4, 4)

    together = search(drafter, embedding, hidden, init_ids, shape)
    backwards = search(drafter, embedding, hidden.flip(0), init_ids.flip(0), shape)

    for row in range(5):
        alone = search(drafter, embedding, hidden[row : row + 1], init_ids[row : row + 1], shape)
        assert_same(by_prefix(together, row), by_prefix(alone, 0))
        assert_same(by_prefix(backwards, 4 - row), by_prefix(alone, 0))


def test_the_search_draws_nothing_and_repeats_itself() -> None:
    setting = make_setting(seed=4)
    state = torch.get_rng_state()

    first, second = (search(*setting, BeamShape(5, 4)) for _ in range(2))

    assert torch.get_rng_state().equal(state)
    for column, other in zip(first, second, strict=True):
        assert column.equal(other)


@pytest.mark.parametrize("num_nodes", [4, 8, 16])
@pytest.mark.parametrize("seed", range(6))
def test_more_candidates_never_lower_the_probability_of_the_best_nodes(seed: int, num_nodes: int) -> None:
    setting = make_setting(seed)

    masses = [
        search(*setting, BeamShape(4, 4), num_candidates).log_probs.topk(num_nodes, dim=1).values.exp().sum(dim=1)
        for num_candidates in (None, 4, 6, 9, 16, 63)
    ]

    assert (torch.stack(masses).diff(dim=0) >= -1e-6).all()
    assert masses[0].equal(masses[1])
    assert num_nodes < 16 or bool((masses[-1] > masses[0]).any())


def test_sharpness_scales_the_head() -> None:
    drafter, embedding, hidden, init_ids = make_setting(seed=5)
    shape = BeamShape(4, 5)
    plain = search(drafter, embedding, hidden, init_ids, shape)

    found = search(drafter, embedding, hidden, init_ids, shape, sharpness=2.0)
    with torch.no_grad():
        drafter.lm_head[-1].weight *= 2
    expected = search(drafter, embedding, hidden, init_ids, shape)

    assert not torch.equal(plain.token_ids, expected.token_ids)
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.parents, expected.parents)
    torch.testing.assert_close(found.log_probs, expected.log_probs)


@pytest.mark.parametrize("fields", [{}, {"draft_vocab_size": 9}, {"top_k": 4}])
@pytest.mark.parametrize("num_candidates", [None, 12])
def test_foresight_changes_logits_by_depth_and_draft_id_before_they_are_sharpened(
    fields: dict[str, object], num_candidates: int | None
) -> None:
    setting = make_setting(seed=6, **fields)
    drafter, embedding, hidden, init_ids = setting
    shape = BeamShape(3, 3)
    noise = 2 * torch.randn(len(init_ids), 3, drafter.config.head_size, generator=torch.Generator().manual_seed(7))

    found = search(
        *setting, shape, num_candidates, sharpness=1.5, foresight=lambda depth, logits: logits + noise[:, depth, None]
    )

    assert not torch.equal(found.token_ids, search(*setting, shape, num_candidates, sharpness=1.5).token_ids)
    for row, init_id in enumerate(init_ids.tolist()):
        log_probs = naive.drafter_log_probs(drafter, embedding.weight, hidden[row], init_id, 1.5, noise[row])
        expected = naive.beam_search(log_probs, *shape, num_candidates)
        assert expected.smallest_gap > 1e-6
        assert_same(by_prefix(found, row), {k: v for depth in expected.candidates for k, v in depth.items()})


@pytest.mark.parametrize("floor", [-1.0, -3.0, -6.0, -1000.0])
def test_a_floor_loses_no_candidate_above_it(floor: float) -> None:
    setting = make_setting(seed=8, batch_size=2)
    shape = BeamShape(4, 5)

    whole, floored = search(*setting, shape), search(*setting, shape, floor=floor)

    assert floored.token_ids.shape[1] <= whole.token_ids.shape[1]
    for row in range(2):
        above = {prefix: value for prefix, value in by_prefix(whole, row).items() if value > floor}
        found = {prefix: value for prefix, value in by_prefix(floored, row).items() if value > floor}
        assert_same(found, above)


def test_a_floor_that_nothing_reaches_ends_the_search_at_the_first_depth() -> None:
    setting = make_setting(seed=8)

    assert search(*setting, BeamShape(4, 5), floor=0.0).token_ids.shape == (3, 4)


@pytest.mark.parametrize(("width", "length"), [(1, 4), (3, 3), (10, 3), (50, 2), (60, 1), (60, 2), (60, 3)])
def test_surviving_beams_and_scores_are_apples(width: int, length: int) -> None:
    """Apple keeps dead beams at -50000; the beams that live are ours, for widths beyond its 50 candidates too."""
    setting = make_setting(seed=100 + width + length, batch_size=2, vocab_size=64, top_k=50)
    drafter, embedding, hidden, init_ids = setting

    candidates = search(*setting, BeamShape(width, length))

    for row in range(2):
        log_probs = naive.drafter_log_probs(drafter, embedding.weight, hidden[row], int(init_ids[row]))
        assert naive.beam_search(log_probs, width, length).smallest_gap > 1e-6
        apple = {prefix: score for score, prefix in naive.apple_beam_search(log_probs, width, length) if score > -25000}
        ours = {prefix: score for prefix, score in by_prefix(candidates, row).items() if len(prefix) == length}
        assert_same(ours, apple)
        if length > 1 or width <= 50:
            assert len(apple) == width
        else:
            assert len(apple) == 50


def test_a_beam_wider_than_top_k_has_no_candidate_beyond_it() -> None:
    setting = make_setting(seed=6, vocab_size=80, top_k=50)

    first = search(*setting, BeamShape(60, 1))

    assert first.log_probs.isfinite().sum(dim=1).tolist() == [50, 50, 50]
    torch.testing.assert_close(first.log_probs.exp().sum(dim=1), torch.ones(3))


def test_drafted_tokens_are_the_targets() -> None:
    setting = make_setting(seed=7, draft_vocab_size=5)

    candidates = search(*setting, BeamShape(5, 3))

    assert set(candidates.token_ids.unique().tolist()) <= set(setting[0].target_ids().tolist())
    assert candidates.token_ids.max() >= 5


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (-1, 2)])
def test_a_shape_below_one_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="width and length must be at least 1"):
        search(*make_setting(seed=0), BeamShape(*shape))


def test_half_precision_drafters_are_scored_in_float32() -> None:
    drafter, embedding, hidden, init_ids = make_setting(seed=9)

    candidates = search(drafter.bfloat16(), embedding, hidden.bfloat16(), init_ids, BeamShape(20, 1))

    assert candidates.log_probs.dtype == torch.float32
    np.testing.assert_allclose(candidates.log_probs.exp().sum(dim=1), 1, atol=1e-5)
