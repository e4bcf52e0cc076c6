from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_redrafter.core.beam_search import Candidates, best_continuations, join
from vllm_redrafter.kernels import reference
from vllm_redrafter.kernels.batch import PaddedTrees

draft_trees = pytest.importorskip("vllm_redrafter.kernels.draft_trees", reason="needs Triton", exc_type=ImportError)

VOCAB = 6
UNWRITTEN = -12345


def searched(batch_size: int, width: int, length: int, num_kept: int, seed: int, num_levels: int = 0) -> Candidates:
    """Returns what a beam search over random logits keeps; with only a few levels of logits, most are ties."""
    generator = torch.Generator().manual_seed(seed)
    scores, first, num_found = torch.zeros(batch_size, 1), -1, 0
    depths = []
    for _ in range(length):
        shape = (batch_size, scores.shape[1], VOCAB)
        logits = 2 * torch.randn(shape, generator=generator)
        if num_levels:
            logits = torch.randint(num_levels, shape, generator=generator).float()
        best = best_continuations(logits, scores, max(width, num_kept))
        depths.append(Candidates(best.draft_ids, best.beams + first, best.log_probs))
        first, num_found = num_found, num_found + best.beams.shape[1]
        scores = best.log_probs[:, :width]
    return join(depths)


def grown(batch_size: int, num_candidates: int, seed: int) -> Candidates:
    """Returns random trees in no order but parents first, of few levels of log-probabilities, -inf among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, num_candidates)
    parents = (torch.rand(shape, generator=generator) * (1 + torch.arange(num_candidates))).long() - 1
    # some are as probable as what they continue, and some impossible
    steps = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 3.0, math.inf])
    drops = steps[torch.randint(len(steps), shape, generator=generator)]
    log_probs = torch.zeros(batch_size, 1 + num_candidates)
    for column in range(num_candidates):
        above = log_probs.gather(1, 1 + parents[:, column, None])[:, 0]
        log_probs[:, 1 + column] = above - drops[:, column]
    return Candidates(torch.randint(1000, shape, generator=generator), parents, log_probs[:, 1:].contiguous())


def unwritten(batch_size: int, num_nodes: int) -> PaddedTrees:
    return PaddedTrees(
        *(column.fill_(UNWRITTEN) for column in PaddedTrees.zeros(batch_size, num_nodes, torch.device("cpu")))
    )


def drafted(
    candidates: Candidates, num_nodes: int, linear: tuple[int, ...] = (), init_ids: torch.Tensor | None = None
) -> PaddedTrees:
    """Returns the kernel's trees, which were written everywhere and are the twin's to the bit."""
    batch_size = len(candidates.parents)
    init_ids = 500 + torch.arange(batch_size) if init_ids is None else init_ids
    is_linear = torch.tensor([row in linear for row in range(batch_size)])
    trees, twins = unwritten(batch_size, num_nodes), unwritten(batch_size, num_nodes)

    draft_trees.draft_trees(init_ids, candidates, is_linear, trees)

    reference.draft_trees(init_ids, candidates, is_linear, twins)
    for ours, twin in zip(trees, twins, strict=True):
        assert torch.equal(ours, twin)
    return trees


@pytest.mark.parametrize("num_levels", [0, 2], ids=["distinct", "ties"])
@pytest.mark.parametrize(("batch_size", "linear"), [(1, ()), (1, (0,)), (5, (1, 4))], ids=str)
@pytest.mark.parametrize("num_nodes", [1, 5, 16, 63])
def test_the_trees_of_a_search_are_the_twins(
    num_nodes: int, batch_size: int, linear: tuple[int, ...], num_levels: int
) -> None:
    candidates = searched(batch_size, 4, 5, num_nodes, seed=num_nodes, num_levels=num_levels)

    trees = drafted(candidates, num_nodes, linear)

    if num_nodes > 1 and not linear:
        assert (trees.parents[:, 1:] != torch.arange(num_nodes)).any(), "no tree branches"


@settings(deadline=None, max_examples=40)
@given(
    num_nodes=st.integers(1, 20),
    batch_size=st.integers(1, 3),
    num_candidates=st.integers(1, 40),
    linear=st.sets(st.integers(0, 2)),
    seed=st.integers(0, 10_000),
)
def test_the_trees_of_any_candidates_are_the_twins(
    num_nodes: int, batch_size: int, num_candidates: int, linear: set[int], seed: int
) -> None:
    drafted(grown(batch_size, num_candidates, seed), num_nodes, tuple(linear))


@pytest.mark.parametrize("num_candidates", [63, 64, 65, 630, 1024])
def test_the_largest_trees_of_many_candidates(num_candidates: int) -> None:
    drafted(grown(2, num_candidates, seed=num_candidates), 63, linear=(1,))


def test_a_worked_example() -> None:
    # 1 and 2 are equals, of which the first comes first; 6 is one too many
    candidates = Candidates(
        torch.tensor([[1, 2, 3, 5, 4, 6]]),
        torch.tensor([[-1, -1, 0, 1, 2, 4]]),
        torch.tensor([[-1.0, -1.0, -2.0, -3.0, -2.5, -9.0]]),
    )

    trees = drafted(candidates, num_nodes=5, init_ids=torch.tensor([7]))

    assert trees.token_ids.tolist() == [[7, 1, 3, 4, 2, 5]]
    assert trees.parents.tolist() == [[-1, 0, 1, 2, 0, 4]]
    assert trees.depths.tolist() == [[0, 1, 2, 3, 1, 2]]
    assert trees.ancestors.tolist() == [[0b1, 0b11, 0b111, 0b1111, 0b10001, 0b110001]]


def test_among_equals_the_first_is_the_best() -> None:
    width = 40
    candidates = Candidates(
        torch.arange(width)[None], torch.full((1, width), -1), torch.tensor([[-1.0] * (width - 1) + [-0.5]])
    )

    assert drafted(candidates, 4).token_ids.tolist() == [[500, width - 1, 0, 1, 2]]


def test_a_path_of_63_nodes_sets_the_last_bit() -> None:
    candidates = Candidates(
        torch.arange(100, 163)[None], torch.arange(-1, 62)[None], -torch.arange(63, dtype=torch.float32)[None]
    )

    for linear in ((), (0,)):
        trees = drafted(candidates, 63, linear)
        assert trees.depths.tolist() == [list(range(64))]
        assert trees.ancestors[0, 63] == -1


def test_a_linear_request_gets_the_first_path_and_its_neighbours_their_trees() -> None:
    candidates = searched(3, 4, 4, 16, seed=1)

    free, mixed = drafted(candidates, 16), drafted(candidates, 16, linear=(1,))

    size = int((free.parents[1] == torch.arange(-1, 16)).cumprod(0).sum())
    assert 1 < size < 17
    for before, after in zip(free, mixed, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert torch.equal(before[1, :size], after[1, :size])
    assert (mixed.token_ids[1, size:] == 501).all()
    assert (mixed.parents[1, size:] == -1).all()


def test_without_candidates_there_is_the_root_alone() -> None:
    nothing = Candidates(torch.tensor([[3, 4]]), torch.tensor([[-1, 0]]), torch.full((1, 2), -math.inf))

    trees = drafted(nothing, 3)

    assert trees.token_ids.tolist() == [[500] * 4]
    assert trees.ancestors.tolist() == [[1, 0, 0, 0]]


def test_ids_that_stand_for_no_token_are_padding() -> None:
    candidates = searched(2, 3, 3, 5, seed=2)
    candidates.token_ids[0, 0] = -1

    drafted(candidates, 5, init_ids=torch.tensor([8, -1]))


def test_candidates_that_are_not_a_number_are_none() -> None:
    candidates = Candidates(
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
        torch.full((2, 3), -1),
        torch.tensor([[math.nan, -2.0, -1.0], [math.nan] * 3]),
    )
    trees = unwritten(2, 3)

    draft_trees.draft_trees(torch.tensor([8, 9]), candidates, torch.tensor([False, False]), trees)

    assert trees.token_ids.tolist() == [[8, 3, 2, 8], [9] * 4]
    assert trees.parents.tolist() == [[-1, 0, 0, -1], [-1] * 4]


def test_what_fits_no_tree_is_refused() -> None:
    candidates = searched(2, 3, 3, 5, seed=4)
    init_ids, is_linear, trees = torch.tensor([1, 2]), torch.tensor([False, False]), unwritten(2, 5)

    with pytest.raises(ValueError, match="num_speculative_tokens is 64"):
        draft_trees.draft_trees(init_ids, candidates, is_linear, unwritten(2, 64))
    with pytest.raises(ValueError, match="pass contiguous tensors of one batch"):
        draft_trees.draft_trees(init_ids[:1], candidates, is_linear, trees)
    with pytest.raises(ValueError, match="pass contiguous tensors of one batch"):
        draft_trees.draft_trees(init_ids, candidates, is_linear, trees.first(1))
    with pytest.raises(ValueError, match="pass contiguous tensors of one batch"):
        draft_trees.draft_trees(
            init_ids, Candidates(*(column.T.contiguous().T for column in candidates)), is_linear, trees
        )
