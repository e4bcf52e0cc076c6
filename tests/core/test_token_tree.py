from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core import naive
from vllm_redrafter.core.beam_search import BeamShape, Candidates, search
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.core.token_tree import TokenTree, attention_mask, best_nodes, chain, merge

ROOT = 7
PAPER_BEAMS = [[1, 2, 3], [1, 4, 3], [5, 2, 3], [1, 2, 6], [1, 2, 3]]
PAPER_SCORES = {
    (1,): -0.5,
    (1, 2): -1.0,
    (1, 2, 3): -1.5,
    (1, 4): -1.2,
    (5,): -1.6,
    (1, 2, 6): -2.0,
    (1, 4, 3): -2.2,
    (5, 2): -2.5,
    (5, 2, 3): -3.0,
}


def random_beams(batch: int, width: int, length: int, vocab: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return beams of few tokens, so with many shared prefixes and duplicates, and scores that prefixes determine."""
    rng = np.random.default_rng(seed)
    beams = torch.from_numpy(rng.integers(vocab, size=(batch, width, length)))
    scores: dict[tuple[int, naive.Prefix], float] = {}
    log_probs = torch.zeros(batch, width, length)
    for row in range(batch):
        for beam in range(width):
            total = 0.0
            for depth in range(length):
                prefix = tuple(beams[row, beam, : depth + 1].tolist())
                total += scores.setdefault((row, prefix), -float(np.float32(rng.exponential())))
                log_probs[row, beam, depth] = total
    return beams, log_probs


def scores_of(beams: torch.Tensor, log_probs: torch.Tensor, row: int) -> dict[naive.Prefix, float]:
    return {
        tuple(beam[: depth + 1].tolist()): float(log_probs[row, i, depth])
        for i, beam in enumerate(beams[row])
        for depth in range(beams.shape[2])
    }


beam_cases = st.tuples(
    st.integers(1, 4),  # batch
    st.integers(1, 12),  # width
    st.integers(1, 6),  # length
    st.integers(1, 4),  # vocabulary
    st.integers(0, 2**32 - 1),  # seed
)
budgets = st.integers(1, 63)


def tree_of(case: tuple[int, int, int, int, int], budget: int) -> tuple[TokenTree, torch.Tensor, torch.Tensor]:
    beams, log_probs = random_beams(*case)
    init_ids = torch.full((len(beams),), ROOT)
    return best_nodes(init_ids, merge(beams, log_probs), budget), beams, log_probs


def test_the_worked_example_is_laid_out_depth_first_with_the_best_child_first() -> None:
    beams = torch.tensor([PAPER_BEAMS])
    log_probs = torch.tensor([[[PAPER_SCORES[tuple(beam[: i + 1])] for i in range(3)] for beam in PAPER_BEAMS]])

    tree = best_nodes(torch.tensor([ROOT]), merge(beams, log_probs), 9)

    assert tree.token_ids.tolist() == [[7, 1, 2, 3, 6, 4, 3, 5, 2, 3]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2, 2, 1, 5, 0, 7, 8]]
    assert tree.depths.tolist() == [[0, 1, 2, 3, 3, 2, 3, 1, 2, 3]]
    assert tree.num_nodes.tolist() == [9]
    visible = [set(torch.nonzero(row).flatten().tolist()) for row in attention_mask(tree)[0]]
    assert visible == [
        {0},
        {0, 1},
        {0, 1, 2},
        {0, 1, 2, 3},
        {0, 1, 2, 4},
        {0, 1, 5},
        {0, 1, 5, 6},
        {0, 7},
        {0, 7, 8},
        {0, 7, 8, 9},
    ]


def test_the_worked_example_cut_to_four_nodes_keeps_the_four_most_probable() -> None:
    beams = torch.tensor([PAPER_BEAMS])
    log_probs = torch.tensor([[[PAPER_SCORES[tuple(beam[: i + 1])] for i in range(3)] for beam in PAPER_BEAMS]])

    tree = best_nodes(torch.tensor([ROOT]), merge(beams, log_probs), 4)

    assert naive.prefixes(tree) == [(), (1,), (1, 2), (1, 2, 3), (1, 4)]


@settings(deadline=None, max_examples=150)
@given(beam_cases, budgets)
def test_a_tree_is_the_trie_of_the_most_probable_prefixes_in_depth_first_order(
    case: tuple[int, int, int, int, int], budget: int
) -> None:
    tree, beams, log_probs = tree_of(case, budget)

    for row in range(len(beams)):
        scores = scores_of(beams, log_probs, row)
        distinct = naive.trie([tuple(beam.tolist()) for beam in beams[row]])
        assert set(scores) == distinct
        nodes = naive.prefixes(tree, row)
        assert len(nodes) == len(set(nodes)) == 1 + min(budget, len(distinct))
        kept = sorted((scores[node] for node in nodes[1:]), reverse=True)
        assert kept == sorted(scores.values(), reverse=True)[: len(kept)]
        assert nodes[1:] == naive.layout(scores, budget)
        assert tree.log_probs[row, : len(nodes)].tolist() == [scores.get(node, 0.0) for node in nodes]


@settings(deadline=None, max_examples=100)
@given(beam_cases, budgets)
def test_every_prefix_of_the_layout_is_a_tree(case: tuple[int, int, int, int, int], budget: int) -> None:
    tree, beams, _ = tree_of(case, budget)

    for row in range(len(beams)):
        nodes = naive.prefixes(tree, row)
        for size in range(1, len(nodes) + 1):
            cut = nodes[:size]
            assert all(node[:-1] in cut for node in cut)


@settings(deadline=None, max_examples=100)
@given(beam_cases, budgets)
def test_ancestor_bits_are_the_transitive_closure_of_the_parents(
    case: tuple[int, int, int, int, int], budget: int
) -> None:
    tree, beams, _ = tree_of(case, budget)

    mask = attention_mask(tree)
    for row in range(len(beams)):
        nodes = naive.prefixes(tree, row)
        for i, node in enumerate(nodes):
            above = {j for j, other in enumerate(nodes) if node[: len(other)] == other}
            assert int(tree.ancestors[row, i]) % 2**64 == sum(1 << j for j in above)
            assert set(torch.nonzero(mask[row, i]).flatten().tolist()) == above
            assert int(tree.depths[row, i]) == len(node)


@settings(deadline=None, max_examples=100)
@given(beam_cases, budgets)
def test_the_most_probable_leaf_path_comes_first_and_every_path_adds_neighbours(
    case: tuple[int, int, int, int, int], budget: int
) -> None:
    tree, beams, log_probs = tree_of(case, budget)

    for row in range(len(beams)):
        scores = scores_of(beams, log_probs, row)
        nodes = naive.prefixes(tree, row)
        index = {node: i for i, node in enumerate(nodes)}
        parents = {node[:-1] for node in nodes[1:]}
        leaves = [node for node in nodes[1:] if node not in parents]
        placed = 0
        for leaf in leaves:  # in the order of the layout
            path = [index[leaf[:depth]] for depth in range(1, len(leaf) + 1)]
            new = [i for i in path if i > placed]
            assert new == list(range(placed + 1, placed + 1 + len(new)))
            placed += len(new)
        best: naive.Prefix = ()
        while children := [node for node in nodes if node[:-1] == best and node]:
            best = max(children, key=lambda node: scores[node])
        assert [index[best[:depth]] for depth in range(len(best) + 1)] == list(range(len(best) + 1))


@settings(deadline=None, max_examples=50)
@given(beam_cases, budgets)
def test_places_without_a_node_are_padding(case: tuple[int, int, int, int, int], budget: int) -> None:
    tree, beams, _ = tree_of(case, budget)

    for row in range(len(beams)):
        first = 1 + int(tree.num_nodes[row])
        assert (tree.token_ids[row, first:] == -1).all()
        assert (tree.parents[row, first:] == -1).all()
        assert (tree.depths[row, first:] == 0).all()
        assert (tree.ancestors[row, first:] == 0).all()
        assert (tree.log_probs[row, first:] == 0).all()
        assert not attention_mask(tree)[row, :first, first:].any()
        assert int(tree.token_ids[row, 0]) == ROOT
        assert int(tree.parents[row, 0]) == -1


@settings(deadline=None, max_examples=50)
@given(beam_cases, budgets)
def test_rows_of_a_batch_do_not_see_each_other(case: tuple[int, int, int, int, int], budget: int) -> None:
    tree, beams, log_probs = tree_of(case, budget)

    for row in range(len(beams)):
        alone = best_nodes(torch.tensor([ROOT]), merge(beams[row : row + 1], log_probs[row : row + 1]), budget)
        for column, expected in zip(tree, alone, strict=True):
            torch.testing.assert_close(column[row : row + 1], expected, rtol=0, atol=0)


def test_identical_beams_collapse_to_one_path() -> None:
    beams = torch.tensor([[[4, 4, 9]] * 6])

    tree = best_nodes(torch.tensor([ROOT]), merge(beams, torch.tensor([[[-1.0, -2.0, -3.0]] * 6])), 20)

    assert naive.prefixes(tree) == [(), (4,), (4, 4), (4, 4, 9)]


def test_among_equally_probable_prefixes_the_parent_is_kept_before_its_child() -> None:
    beams = torch.tensor([[[1, 2, 3], [4, 5, 6]]])

    for budget in range(1, 7):
        tree = best_nodes(torch.tensor([ROOT]), merge(beams, torch.zeros(1, 2, 3)), budget)
        assert len(naive.prefixes(tree)) == 1 + budget


@pytest.mark.parametrize("seed", range(10))
def test_many_equally_probable_candidates_still_make_a_tree(seed: int) -> None:
    beams, _ = random_beams(4, 40, 6, 3, seed)

    tree = best_nodes(torch.full((4,), ROOT), merge(beams, torch.zeros(4, 40, 6)), 63)

    for row in range(4):
        assert len(set(naive.prefixes(tree, row))) == 1 + int(tree.num_nodes[row])


def test_candidates_without_probability_never_become_nodes() -> None:
    candidates = Candidates(
        torch.tensor([[3, 4, 5, 6]]),
        torch.tensor([[-1, -1, 0, 1]]),
        torch.tensor([[-1.0, float("-inf"), -2.0, float("-inf")]]),
    )

    tree = best_nodes(torch.tensor([ROOT]), candidates, 4)

    assert naive.prefixes(tree) == [(), (3,), (3, 5)]
    assert tree.num_nodes.tolist() == [2]


def test_the_largest_tree_uses_all_64_bits() -> None:
    tokens = torch.arange(63)[None, None]

    tree = best_nodes(torch.tensor([ROOT]), merge(tokens, -torch.arange(1.0, 64.0)[None, None]), 63)

    assert int(tree.ancestors[0, -1]) % 2**64 == 2**64 - 1
    assert attention_mask(tree)[0].equal(torch.ones(64, 64, dtype=torch.bool).tril())


def test_a_chain_is_the_tree_of_a_beam_search_of_width_one() -> None:
    torch.manual_seed(0)
    drafter = ReDrafter(ReDrafterConfig(hidden_size=8, vocab_size=20))
    embedding = torch.nn.Embedding(20, 8)
    init_ids = torch.tensor([3, 4])

    candidates = search(drafter, embedding, torch.randn(2, 8), init_ids, BeamShape(1, 5))
    tree = best_nodes(init_ids, candidates, 5)

    expected = chain(torch.cat((init_ids[:, None], candidates.token_ids), dim=1))
    for name in ("token_ids", "parents", "depths", "ancestors", "num_nodes"):
        assert getattr(tree, name).equal(getattr(expected, name))


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 63, 64])
def test_a_chain_sees_what_a_causal_mask_shows(size: int) -> None:
    tree = chain(torch.arange(2 * size).view(2, size))

    assert attention_mask(tree).equal(torch.ones(2, size, size, dtype=torch.bool).tril())


@pytest.mark.parametrize("num_nodes", [-1, 0, 64, 1000])
def test_a_budget_out_of_range_is_refused(num_nodes: int) -> None:
    candidates = Candidates(torch.tensor([[1]]), torch.tensor([[-1]]), torch.tensor([[-1.0]]))

    with pytest.raises(ValueError, match=f"{num_nodes}, but it must lie between 1 and 63"):
        best_nodes(torch.tensor([ROOT]), candidates, num_nodes)
