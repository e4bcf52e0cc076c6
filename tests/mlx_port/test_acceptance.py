from __future__ import annotations

import mlx.core as mx
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_port import acceptance, token_tree
from tests.mlx_port.test_token_tree import _core_tree, candidates
from vllm_redrafter.core import acceptance as core


@settings(deadline=None, max_examples=150)
@given(columns=candidates(), num_nodes=st.integers(1, 63), data=st.data())
def test_walks_are_those_of_torch(
    columns: tuple[list[int], list[int], list[float]], num_nodes: int, data: st.DataObject
) -> None:
    ours, theirs = token_tree.best_nodes(5, *columns, num_nodes), _core_tree(5, columns, num_nodes)
    size = len(ours.token_ids)
    choices = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))

    walk = acceptance.walk(ours, mx.array(choices))
    padded = torch.tensor([choices + [-2] * (theirs.token_ids.shape[1] - size)])
    expected = core.greedy_walk(theirs, padded)

    count = walk.num_accepted.item() + 1
    assert count == int(expected.num_accepted) + 1
    assert walk.token_ids.tolist()[:count] == expected.token_ids[0, :count].tolist()
    assert walk.nodes.tolist()[:count] == expected.nodes[0, :count].tolist()
    assert len(walk.nodes) == 1 + max(ours.depths)


def test_a_root_alone_yields_its_own_draw() -> None:
    walk = acceptance.walk(token_tree.chain([7]), mx.array([3]))

    assert (walk.token_ids.tolist(), walk.nodes.tolist(), walk.num_accepted.item()) == ([3], [0], 0)


def test_a_token_that_no_child_carries_ends_the_walk() -> None:
    tree = token_tree.best_nodes(0, [10, 11, 20], [-1, 0, -1], [-1.0, -1.5, -2.0], 8)

    walk = acceptance.walk(tree, mx.array([10, 12, 11, 99]))

    # 11 stands under 10, but the target drew 12 there
    assert walk.num_accepted.item() == 1
    assert walk.token_ids.tolist()[:2] == [10, 12]
