from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_redrafter.core.beam_search import Continuations
from vllm_redrafter.kernels import reference
from vllm_redrafter.kernels.launch import Launch

best_continuations = pytest.importorskip(
    "vllm_redrafter.kernels.best_continuations", reason="needs Triton", exc_type=ImportError
)

INF = float("inf")


def random_beams(
    batch: int, num_beams: int, head_size: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits and scores."""
    generator = torch.Generator().manual_seed(head_size)
    logits = 3 * torch.randn(batch, num_beams, head_size, generator=generator)
    return logits.to(dtype), -3 * torch.rand(batch, num_beams, generator=generator)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets what no kernel wrote be NaN, or no token."""
    stock = best_continuations.plan

    def plan(*arguments: Any) -> list[Launch]:
        launches: list[Launch] = stock(*arguments)
        for name, value in launches[-1].arguments.items():
            if name.startswith(("out_", "group_", "part_")):
                value.fill_(float("nan") if value.is_floating_point() else -7)
        return launches

    monkeypatch.setattr(best_continuations, "plan", plan)


def assert_best(
    logits: torch.Tensor,
    scores: torch.Tensor,
    num_kept: int,
    noise: torch.Tensor | None = None,
    scale: float = 1.0,
) -> Continuations:
    """Checks the kernel against its twin."""
    expected = reference.best_continuations(logits, scores, num_kept, noise, scale)

    best = best_continuations.best_continuations(logits, scores, num_kept, noise, scale)

    assert torch.equal(best.beams, expected.beams)
    assert torch.equal(best.draft_ids, expected.draft_ids)
    # sums of thousands of exponentials, in another order
    torch.testing.assert_close(best.log_probs, expected.log_probs, rtol=1e-6, atol=5e-6)
    return best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_beams", "head_size", "num_kept"),
    [(1, 10, 1), (1, 33, 4), (3, 1000, 7), (4, 1024, 16), (4, 2049, 16), (5, 3001, 63), (64, 100, 64)],
)
def test_the_best_are_the_twins(num_beams: int, head_size: int, num_kept: int, dtype: torch.dtype) -> None:
    assert_best(*random_beams(2, num_beams, head_size, dtype), num_kept)


def test_more_parts_than_are_kept() -> None:
    logits, scores = random_beams(1, 2, 8192)

    assert best_continuations.plan(logits, scores, 3)[0].grid == (2, 8)
    assert_best(logits, scores, 3)


def test_a_part_grows_where_a_request_would_have_too_many() -> None:
    logits = torch.zeros(1, 1, 128_000).expand(1, 64, 128_000)

    peaks, choose = best_continuations.plan(logits, torch.zeros(1, 64), 63)

    assert peaks.arguments["PART"] == 2048
    assert choose.arguments["PADDED_BEAMS"] * choose.arguments["PADDED_PARTS"] == 4096


def test_larger_parts_and_groups_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best_continuations, "_MAX_PARTS", 4)
    logits, scores = random_beams(1, 2, 8192 + 5)

    assert best_continuations.plan(logits, scores, 5)[0].arguments["PART"] == 8192
    assert_best(logits, scores, 5)


def test_noise_is_added_and_the_sum_multiplied() -> None:
    logits, scores = random_beams(3, 2, 1500)
    noise = 4 * torch.randn(3, 1500, generator=torch.Generator().manual_seed(1))

    best = assert_best(logits, scores, 8, noise, 1.25)

    assert not torch.equal(best.draft_ids, reference.best_continuations(logits, scores, 8, scale=1.25).draft_ids)
    assert not torch.equal(best.log_probs, reference.best_continuations(logits, scores, 8, noise).log_probs)
    assert_best(logits, scores, 8, noise[:, :1].expand(-1, 1500).contiguous(), 0.5)


def test_a_score_decides_which_beam_is_continued() -> None:
    logits = random_beams(1, 1, 1200)[0].expand(1, 3, 1200)

    best = assert_best(logits, torch.tensor([[-40.0, 0.0, -90.0]]), 6)

    assert best.beams.tolist() == [[1] * 6]


def test_the_first_of_equals_comes_first() -> None:
    # ends of groups and of parts, and the same tokens in every beam
    logits = torch.zeros(1, 3, 2500)
    logits[..., [2499, 31, 32, 1023, 1024, 1056, 5]] = 2.0

    best = assert_best(logits, torch.tensor([[0.0, -0.5, 0.0]]), 18)

    assert best.draft_ids[0, :7].tolist() == [5, 31, 32, 1023, 1024, 1056, 2499]
    assert best.beams[0].tolist() == [0] * 7 + [2] * 7 + [1] * 4


@pytest.mark.parametrize("num_kept", [1, 3, 64])
def test_flat_logits_are_continued_in_order(num_kept: int) -> None:
    best = assert_best(torch.zeros(2, 2, 1100), torch.zeros(2, 2), num_kept)

    assert best.draft_ids.tolist() == [list(range(num_kept))] * 2


def test_zero_and_minus_zero_are_equal() -> None:
    logits = torch.full((1, 2, 40), -INF)
    logits[0, 0, 7], logits[0, 1, 3] = -0.0, 0.0

    best = assert_best(logits, torch.tensor([[-0.0, 0.0]]), 2)

    assert best.draft_ids.tolist() == [[7, 3]]


def test_tokens_of_probability_0_come_last_and_in_order() -> None:
    # whole groups, and a whole part, without a finite logit
    logits = torch.full((1, 2, 3000), -INF)
    logits[0, 0, [40, 2900]] = torch.tensor([1.0, 3.0])
    logits[0, 1, 1500] = -2.0

    best = assert_best(logits, torch.tensor([[-0.1, -5.0]]), 6)

    assert best.draft_ids.tolist() == [[2900, 40, 1500, 0, 1, 2]]
    assert best.log_probs[0, 3:].tolist() == [-INF] * 3


def test_dead_beams_are_continued_only_where_nothing_else_is_left() -> None:
    logits, scores = random_beams(1, 3, 12)
    scores[0, [0, 2]] = -INF

    best = assert_best(logits, scores, 30)

    assert best.beams.tolist() == [[1] * 12 + [0] * 12 + [2] * 6]
    assert_best(logits, torch.full_like(scores, -INF), 30)


def test_all_are_returned_where_there_are_fewer() -> None:
    best = assert_best(*random_beams(2, 2, 11), 64)

    assert best.log_probs.shape == (2, 22)


def test_a_certain_token_has_the_probability_1() -> None:
    logits = torch.zeros(1, 2, 100)
    logits[0, :, 9] = 300.0

    best = assert_best(logits, torch.tensor([[0.0, -1.0]]), 2)

    assert best.log_probs.tolist() == [[0.0, -1.0]]


def test_batch_and_beams_may_have_any_stride() -> None:
    logits, scores = random_beams(6, 4, 1300)
    noise = torch.randn(6, 2000, generator=torch.Generator().manual_seed(2))

    assert_best(logits.transpose(0, 1)[::2, 1:5, :1100], scores.T[::2, 1:5], 9, noise[:4:2, 300:1400])


def test_a_batch_without_requests() -> None:
    assert_best(torch.zeros(0, 4, 100), torch.zeros(0, 4), 5)


def test_the_type_of_logits_does_not_matter_to_the_sums() -> None:
    logits, scores = random_beams(1, 2, 2000, torch.float16)

    half = best_continuations.best_continuations(logits, scores, 8)
    full = best_continuations.best_continuations(logits.float(), scores, 8)

    assert all(map(torch.equal, half, full))
    assert [output.dtype for output in half] == [torch.int64, torch.int64, torch.float32]


def test_what_does_not_fit_is_refused() -> None:
    logits, scores = torch.zeros(2, 4, 100), torch.zeros(2, 4)
    best = best_continuations.best_continuations

    for num_kept in (0, 65):
        with pytest.raises(ValueError, match=f"num_kept is {num_kept} for 4 beams"):
            best(logits, scores, num_kept)
    with pytest.raises(ValueError, match="num_kept is 5 for 65 beams"):
        best(torch.zeros(1, 65, 10), torch.zeros(1, 65), 5)
    for scale in (0.0, -1.0, INF):
        with pytest.raises(ValueError, match=f"scale is {scale}"):
            best(logits, scores, 5, scale=scale)
    with pytest.raises(ValueError, match=r"scores \(2, 3\) or noise None do not fit"):
        best(logits, scores[:, :3], 5)
    with pytest.raises(ValueError, match=r"noise \(1, 100\) do not fit"):
        best(logits, scores, 5, torch.zeros(1, 100))
    with pytest.raises(ValueError, match="not contiguous"):
        best(torch.zeros(2, 100, 4).transpose(1, 2), scores, 5)
