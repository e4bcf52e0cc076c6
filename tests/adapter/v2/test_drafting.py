from __future__ import annotations

import pytest
import torch
from torch import nn

from vllm_redrafter.adapter.v2.drafting import draft
from vllm_redrafter.core import beam_search, token_tree
from vllm_redrafter.core.beam_search import BeamShape
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.kernels.batch import DraftStarts, PaddedTrees

HIDDEN, VOCAB, BATCH = 16, 24, 5


@pytest.fixture(scope="module")
def drafter() -> ReDrafter:
    torch.manual_seed(0)
    made = ReDrafter(ReDrafterConfig(HIDDEN, VOCAB, num_draft_layers=1))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


EMBED = nn.Embedding.from_pretrained(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)))


@torch.inference_mode()
def drafted(
    drafter: ReDrafter, shape: BeamShape, num_nodes: int, linear: tuple[int, ...] = ()
) -> tuple[torch.Tensor, PaddedTrees]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(BATCH, HIDDEN, generator=generator)
    init_ids = torch.randint(VOCAB, (BATCH,), generator=generator)
    starts = DraftStarts.zeros(BATCH, HIDDEN, torch.float32, torch.device("cpu"))._replace(
        hidden=hidden, init_ids=init_ids, is_linear=torch.tensor([row in linear for row in range(BATCH)])
    )
    trees = PaddedTrees.zeros(BATCH, num_nodes, torch.device("cpu"))
    draft(drafter, EMBED, starts, shape, trees)
    num_candidates = num_nodes if shape.width > 1 else 1
    candidates = beam_search.search(
        drafter, EMBED, hidden, init_ids, shape, num_candidates, sharpness=beam_search.SHARPNESS
    )
    expected = token_tree.best_nodes(init_ids, candidates, num_nodes)
    found = PaddedTrees(*(column[:, : expected.parents.shape[1]] for column in trees))
    for row in range(BATCH):
        if row not in linear:
            size = 1 + int(expected.num_nodes[row])
            for ours, theirs in zip(found, expected, strict=False):
                assert torch.equal(ours[row, :size], theirs[row, :size])
    return init_ids, trees


def assert_is_padding(trees: PaddedTrees, row: int, first: int, init_id: int) -> None:
    assert (trees.token_ids[row, first:] == init_id).all()
    assert (trees.parents[row, first:] == -1).all()
    assert (trees.depths[row, first:] == 0).all()
    assert (trees.ancestors[row, first:] == 0).all()


@pytest.mark.parametrize("num_nodes", [1, 7, 12])
def test_trees_are_the_cores_best_nodes(drafter: ReDrafter, num_nodes: int) -> None:
    _, trees = drafted(drafter, BeamShape(3, 4), num_nodes)

    assert trees.parents.shape == (BATCH, 1 + num_nodes)
    assert (trees.token_ids >= 0).all()
    if num_nodes > 1:
        assert (trees.parents[:, 1:] != torch.arange(num_nodes)).any(), "no tree branches"


def test_a_tree_that_is_too_small_is_padded_with_valid_ids_that_no_walk_reaches(drafter: ReDrafter) -> None:
    init_ids, trees = drafted(drafter, BeamShape(1, 3), num_nodes=9)

    for row in range(BATCH):
        assert trees.parents[row, :4].tolist() == [-1, 0, 1, 2]
        assert_is_padding(trees, row, 4, int(init_ids[row]))


def test_a_linear_request_gets_the_first_path_of_its_tree_and_its_neighbours_their_trees(drafter: ReDrafter) -> None:
    _, free = drafted(drafter, BeamShape(3, 4), num_nodes=8)

    init_ids, mixed = drafted(drafter, BeamShape(3, 4), num_nodes=8, linear=(1, 4))

    for row in (1, 4):
        follows = free.parents[row] == torch.arange(-1, 8)
        size = int(follows.cumprod(0).sum())
        assert 1 < size < 9
        for before, after in zip(free, mixed, strict=True):
            assert torch.equal(before[row, :size], after[row, :size])
        assert_is_padding(mixed, row, size, int(init_ids[row]))


@pytest.mark.parametrize("length", range(1, 10))
def test_every_prefix_is_a_tree(drafter: ReDrafter, length: int) -> None:
    _, trees = drafted(drafter, BeamShape(4, 3), num_nodes=9, linear=(2,))

    parents, ancestors = trees.parents[:, :length], trees.ancestors[:, :length]
    assert (parents < torch.arange(length)).all()
    assert (ancestors >> length == 0).all()
