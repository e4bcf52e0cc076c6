from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_port import token_tree
from tests.mlx_port.twins import to_numpy
from vllm_redrafter.core import beam_search as core_beam_search
from vllm_redrafter.core import token_tree as core


@st.composite
def candidates(draw: st.DrawFn) -> tuple[list[int], list[int], list[float]]:
    """Draws distinct continuations depth by depth, each at most as probable as its parent, ties included."""
    token_ids: list[int] = []
    parents: list[int] = []
    log_probs: list[float] = []
    shallower = [-1]
    for _ in range(draw(st.integers(1, 5))):
        start = len(token_ids)
        edges = st.tuples(st.sampled_from(shallower), st.integers(0, 9))
        for parent, token_id in draw(st.lists(edges, min_size=1, max_size=20, unique=True)):
            token_ids.append(token_id)
            parents.append(parent)
            log_probs.append((0.0 if parent < 0 else log_probs[parent]) - draw(st.sampled_from((0.0, 0.5, 1.25, 3.0))))
        shallower = list(range(start, len(token_ids)))
    return token_ids, parents, log_probs


def _core_tree(init_id: int, columns: tuple[list[int], list[int], list[float]], num_nodes: int) -> core.TokenTree:
    token_ids, parents, log_probs = columns
    batch = core_beam_search.Candidates(
        torch.tensor([token_ids]), torch.tensor([parents]), torch.tensor([log_probs], dtype=torch.float32)
    )
    return core.best_nodes(torch.tensor([init_id]), batch, num_nodes)


@settings(deadline=None, max_examples=150)
@given(columns=candidates(), num_nodes=st.integers(1, 63))
def test_trees_and_masks_are_those_of_torch(columns: tuple[list[int], list[int], list[float]], num_nodes: int) -> None:
    ours, theirs = token_tree.best_nodes(5, *columns, num_nodes), _core_tree(5, columns, num_nodes)

    size = 1 + int(theirs.num_nodes)
    assert ours.token_ids == theirs.token_ids[0, :size].tolist()
    assert ours.parents == theirs.parents[0, :size].tolist()
    assert ours.depths == theirs.depths[0, :size].tolist()
    assert ours.log_probs == theirs.log_probs[0, :size].tolist()
    mask = core.attention_mask(theirs)[0, :size, :size]
    assert np.array_equal(np.array(token_tree.attention_mask(ours).tolist()), mask.numpy())


@settings(deadline=None, max_examples=50)
@given(columns=candidates(), num_nodes=st.integers(1, 63), max_depth=st.integers(0, 5))
def test_no_node_is_deeper_than_allowed(
    columns: tuple[list[int], list[int], list[float]], num_nodes: int, max_depth: int
) -> None:
    tree = token_tree.best_nodes(5, *columns, num_nodes, max_depth)

    assert max(tree.depths) <= max_depth
    assert len(tree.token_ids) > 1 or max_depth == 0


def test_a_chain_is_a_tree_of_one_path() -> None:
    ours, theirs = token_tree.chain([4, 4, 2]), core.chain(torch.tensor([[4, 4, 2]]))

    assert ours.token_ids == theirs.token_ids[0].tolist()
    assert ours.parents == theirs.parents[0].tolist()
    assert ours.ancestors == theirs.ancestors[0].tolist()
    assert ours.path(1) == [4, 4]


def test_the_best_path_comes_first_and_candidates_that_are_none_are_left_out() -> None:
    # the worked example: "the" -> "cat" (-1) -> "sat" (-1.5); "dog" (-2); "ran" (never)
    tree = token_tree.best_nodes(0, [20, 10, 11, 30], [-1, -1, 1, 1], [-2.0, -1.0, -1.5, float("-inf")], 8)

    assert tree.token_ids == [0, 10, 11, 20]
    assert tree.parents == [-1, 0, 1, 0]
    assert to_numpy(token_tree.attention_mask(tree)).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 0, 0, 1],
    ]


@pytest.mark.parametrize("num_nodes", [0, 64])
def test_a_budget_out_of_range_is_refused(num_nodes: int) -> None:
    with pytest.raises(ValueError, match=f"the tree budget is {num_nodes}, but it must lie between 1 and 63"):
        token_tree.best_nodes(0, [1], [-1], [0.0], num_nodes)
