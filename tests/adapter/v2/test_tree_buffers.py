from __future__ import annotations

import torch

from vllm_redrafter.adapter.v2.tree_buffers import TreeBuffers
from vllm_redrafter.kernels.batch import PaddedTrees

CPU = torch.device("cpu")


def two_trees() -> PaddedTrees:
    """Return a fork and a chain of two nodes each."""
    return PaddedTrees(
        torch.tensor([[5, 6, 7], [5, 6, 7]]),
        torch.tensor([[-1, 0, 0], [-1, 0, 1]]),
        torch.tensor([[0, 1, 1], [0, 1, 2]]),
        torch.tensor([[1, 3, 5], [1, 3, 7]]),
    )


def columns_of(buffers: TreeBuffers) -> list[torch.Tensor]:
    return [buffers.parents, buffers.depths, buffers.ancestors]


def test_trees_are_kept_by_slot_and_the_buffers_stay_where_they_are() -> None:
    buffers = TreeBuffers(4, 2, CPU)
    places = [tensor.data_ptr() for tensor in columns_of(buffers)]

    buffers.store(torch.tensor([3, 0]), two_trees(), torch.tensor([1, 3]))

    assert buffers.parents.tolist() == [[-1, 0, 1], [-1] * 3, [-1] * 3, [-1, 0, 0]]
    assert buffers.depths.tolist() == [[0, 1, 2], [0] * 3, [0] * 3, [0, 1, 1]]
    assert buffers.ancestors.tolist() == [[1, 3, 7], [1, 0, 0], [1, 0, 0], [1, 3, 5]]
    assert [tensor.data_ptr() for tensor in columns_of(buffers)] == places


def test_a_request_in_the_middle_of_its_prompt_is_left_with_its_root() -> None:
    buffers = TreeBuffers(2, 2, CPU)

    buffers.store(torch.tensor([0, 1]), two_trees(), torch.tensor([0, 1]))

    assert buffers.parents.tolist() == [[-1] * 3, [-1, 0, 1]]
    assert buffers.depths.tolist() == [[0] * 3, [0, 1, 2]]
    assert buffers.ancestors.tolist() == [[1, 0, 0], [1, 3, 7]]


def test_a_slot_that_is_given_away_forgets_its_tree() -> None:
    buffers = TreeBuffers(2, 2, CPU)
    buffers.store(torch.tensor([0, 1]), two_trees(), torch.tensor([1, 3]))

    buffers.clear(1)

    assert buffers.parents.tolist() == [[-1, 0, 0], [-1] * 3]
    assert buffers.depths.tolist() == [[0, 1, 1], [0] * 3]
    assert buffers.ancestors.tolist() == [[1, 3, 5], [1, 0, 0]]
