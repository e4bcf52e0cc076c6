from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapter.trees import draft_tree, prefixes, random_tree, tree_of
from tests.core.naive import Prefix
from vllm_redrafter.adapter.attention_rounds import Segment
from vllm_redrafter.adapter.tree_batch import (
    DraftTree,
    along,
    assemble,
    best_path,
    best_tree,
    chain_of,
    of_roots,
    path_segments,
    path_to,
)
from vllm_redrafter.core import token_tree
from vllm_redrafter.core.beam_search import BeamShape, Candidates, search
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

seeds = st.integers(0, 2**32 - 1)


def some_tree(rng: np.random.Generator, max_nodes: int = 30) -> DraftTree:
    return draft_tree(
        random_tree(rng, int(rng.integers(1, max_nodes)), int(rng.integers(1, 9)), int(rng.integers(1, 7)))
    )


def naive_leaves(nodes: list[Prefix]) -> list[Prefix]:
    return [node for node in nodes if not any(other[:-1] == node for other in nodes if other)]


def naive_segments(tree: DraftTree, request: int, query_start: int, root_row: int, num_computed: int) -> list[Segment]:
    """Return the segments of a tree, from prefixes: every leaf's path, what of it is new, and what it lacks."""
    nodes = prefixes(tree)
    row_of = {node: root_row + index for index, node in enumerate(nodes)}
    context = num_computed + root_row - query_start
    seen: set[Prefix] = set()
    segments = []
    leaves = naive_leaves(nodes)
    for number, leaf in enumerate(leaves):
        path = [leaf[:depth] for depth in range(len(leaf) + 1)]
        new = sorted(row_of[node] for node in path if node not in seen)
        seen.update(path)
        start = new[0] if segments else query_start  # what stands before the first root belongs to the first path
        # a slot holds what the last path served before this one, long enough to reach it, has there: paths are served
        # from the last to the first, and before them all vLLM has written the rows in their order
        before = leaves[number + 1 :]
        lacking = [
            (row_of[node], root_row + depth)
            for depth, node in enumerate(path)
            if node != next((other[:depth] for other in before if len(other) >= depth), nodes[depth])
        ]
        segments.append(Segment(request, start, new[-1] + 1, context + len(path), *_columns(lacking)))
    return segments


def _columns(pairs: list[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(first for first, _ in pairs), tuple(second for _, second in pairs)


def test_a_worked_example_has_one_segment_per_leaf() -> None:
    tree = tree_of([(1, 2, 3), (1, 2, 6), (1, 4), (5,)])
    assert tree.token_ids == [1, 2, 3, 6, 4, 5]
    batch = assemble({"a": tree}, ["p", "a"], {"a": tree.token_ids}, [3, 10])

    segments = batch.segments([3, 10], [8, 20])

    assert segments == [
        [Segment(0, 0, 3, 11, (), ())],
        [
            Segment(1, 3, 7, 24, (6,), (6,)),
            Segment(1, 7, 8, 24, (5, 7), (5, 6)),
            Segment(1, 8, 9, 23, (4, 8), (4, 5)),
            Segment(1, 9, 10, 22, (9,), (4,)),
        ],
    ]


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_segments_of_any_batch_equal_those_of_a_naive_derivation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    proposed: dict[str, DraftTree] = {}
    scheduled: dict[str, list[int]] = {}
    query_ends: list[int] = []
    expected = []
    num_computed = rng.integers(100, size=6).tolist()
    names = [f"request-{index}" for index in range(6)]
    for index, name in enumerate(names):
        query_start = query_ends[-1] if query_ends else 0
        num_before = int(rng.integers(20)) if rng.random() < 0.4 else 0
        tree = some_tree(rng) if rng.random() < 0.7 else chain_of([])
        if tree.token_ids:
            proposed[name], scheduled[name] = tree, tree.token_ids
        root_row = query_start + num_before
        query_ends.append(root_row + 1 + len(tree.token_ids))
        expected.append(naive_segments(tree, index, query_start, root_row, num_computed[index]))

    batch = assemble(proposed, names, scheduled, query_ends)

    assert batch.segments(query_ends, num_computed) == expected
    assert batch.num_nodes == sum(map(len, scheduled.values()))
    assert batch.num_branching == sum(len(segments) > 1 for segments in expected)
    assert batch.num_truncated == batch.num_replaced == 0
    covered = [row for segments in expected for segment in segments for row in range(segment.start, segment.end)]
    assert covered == list(range(query_ends[-1])), "every row is a query of one call"


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_whatever_the_scheduler_cuts_off_leaves_the_tree_of_the_nodes_before(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tree = some_tree(rng)
    nodes = prefixes(tree)
    for size in range(1, len(tree.token_ids) + 1):
        batch = assemble({"a": tree}, ["a"], {"a": tree.token_ids[:size]}, [1 + size])

        assert prefixes(batch.trees[0]) == nodes[: 1 + size]
        assert batch.trees[0].scores == tree.scores[:size]
        assert batch.num_truncated == (size < len(tree.token_ids))
        assert batch.num_replaced == 0
        segments = batch.segments([1 + size], [7])[0]
        assert segments == naive_segments(batch.trees[0], 0, 0, 0, 7)


def test_padding_of_the_scheduler_is_verified_as_a_chain() -> None:
    tree = tree_of([(1, 2), (3,)])

    batch = assemble({"a": tree}, ["a", "b"], {"a": [-1, -1, -1], "b": [-1, -1]}, [4, 7])

    assert batch.trees == [chain_of([-1, -1, -1]), chain_of([-1, -1])]
    assert (batch.num_replaced, batch.num_branching, batch.num_truncated) == (2, 0, 0)
    assert batch.trees[0].parents == [-1, 0, 1, 2]
    assert batch.trees[0].depths == [0, 1, 2, 3]


def test_drafts_that_are_not_the_proposed_ones_are_verified_as_a_chain() -> None:
    tree = tree_of([(1, 2), (3,)])

    for drafts in ([1, 3], [1, 2, 3, 4], [2]):
        batch = assemble({"a": tree}, ["a"], {"a": drafts}, [1 + len(drafts)])

        assert batch.trees == [chain_of(drafts)]
        assert batch.num_replaced == 1


def test_a_step_with_a_row_per_request_is_that_of_requests_without_drafts() -> None:
    assert of_roots(3) == assemble({}, ["a", "b", "c"], {}, [1, 2, 3])


def test_requests_without_drafts_have_a_tree_of_the_root_alone_in_their_last_row() -> None:
    tree = tree_of([(1, 2), (3,)])

    batch = assemble({"b": tree, "gone": tree}, ["a", "b", "c"], {"b": tree.token_ids}, [5, 9, 10])

    assert [each.token_ids for each in batch.trees] == [[], [1, 2, 3], []]
    assert batch.root_rows == [4, 5, 9]
    assert batch.logit_rows == [0, 1, 5]
    assert (batch.num_branching, batch.num_truncated, batch.num_replaced) == (1, 0, 0)


def test_rows_that_logits_are_computed_for_follow_each_other_without_gaps() -> None:
    rng = np.random.default_rng(0)
    trees = {str(index): some_tree(rng) for index in range(0, 8, 2)}
    scheduled = {name: tree.token_ids for name, tree in trees.items()}
    names = [str(index) for index in range(8)]
    lengths = [1 + len(scheduled.get(name, [])) for name in names]

    batch = assemble(trees, names, scheduled, np.cumsum([length + 3 for length in lengths]).tolist())

    assert batch.logit_rows == [sum(lengths[:index]) for index in range(8)]
    assert batch.root_rows == [sum(lengths[:index]) + 3 * index + 3 for index in range(8)]


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 20))
def test_the_best_tree_is_the_cores(seed: int, num_nodes: int) -> None:
    rng = np.random.default_rng(seed)
    beams = torch.from_numpy(rng.integers(5, size=(1, 6, 4)))
    # scores from few values: ties, which must fall the same way, and candidates of no probability
    steps = torch.from_numpy(rng.choice([0.0, 0.5, 1.0, np.inf], size=(4, 5))).float()[torch.arange(4), beams]
    candidates = token_tree.merge(beams, -steps.cumsum(dim=-1))

    tree = best_tree(*(column[0].tolist() for column in candidates), num_nodes)

    assert tree == draft_tree(token_tree.best_nodes(torch.tensor([0]), candidates, num_nodes))


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 6))
def test_the_best_path_leads_from_best_child_to_best_child(seed: int, batch: int, width: int, num_nodes: int) -> None:
    torch.manual_seed(seed)
    drafter = ReDrafter(ReDrafterConfig(8, 12, num_draft_layers=1))
    with torch.inference_mode():
        inputs = torch.randn(batch, 8), torch.zeros(batch, dtype=torch.int64)
        candidates = search(drafter, torch.nn.Embedding(12, 8), *inputs, BeamShape(width, 4), 5)

    paths = along(candidates, [best_path(parents) for parents in candidates.parents.tolist()])

    assert torch.equal(paths.token_ids, candidates.token_ids)
    assert torch.equal(paths.parents, candidates.parents)
    for tokens, parents, log_probs, kept in zip(
        *(each.tolist() for each in candidates), paths.log_probs.tolist(), strict=True
    ):
        node, path = -1, []
        while children := [place for place, parent in enumerate(parents) if parent == node]:
            node = max(children, key=log_probs.__getitem__)
            path.append(node)
        assert [place for place, log_prob in enumerate(kept) if log_prob > -np.inf] == path
        assert best_tree(tokens, parents, kept, num_nodes).token_ids == [tokens[place] for place in path[:num_nodes]]


def test_a_best_path_ends_where_its_last_node_has_no_children() -> None:
    assert [best_path(parents) for parents in ([-1, -1, 0, 0], [-1, -1, 1, 1], [])] == [[0, 2], [0], []]


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_the_children_of_a_node_are_found_by_their_tokens(seed: int) -> None:
    tree = some_tree(np.random.default_rng(seed))
    nodes = prefixes(tree)

    assert tree.children() == {(nodes.index(node[:-1]), node[-1]): index for index, node in enumerate(nodes) if node}


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_the_new_nodes_of_paths_cover_a_tree_and_paths_lead_back_to_the_root(seed: int) -> None:
    tree = some_tree(np.random.default_rng(seed))
    nodes = prefixes(tree)

    segments = path_segments(tree.parents)

    assert [end - 1 for _, end in segments] == [nodes.index(leaf) for leaf in naive_leaves(nodes)]
    assert [node for start, end in segments for node in range(start, end)] == list(range(len(nodes)))
    for node, prefix in enumerate(nodes):
        assert [nodes[step] for step in path_to(tree.parents, node)] == [prefix[:d] for d in range(len(prefix) + 1)]


def test_a_chain_is_the_tree_that_the_core_makes_of_one_beam() -> None:
    one_beam = Candidates(torch.tensor([[4, 2, 9]]), torch.tensor([[-1, 0, 1]]), torch.tensor([[-0.1, -0.2, -0.4]]))

    assert draft_tree(token_tree.best_nodes(torch.tensor([0]), one_beam, 3))._replace(scores=[]) == chain_of([4, 2, 9])
    assert chain_of([]) == DraftTree([], [-1], [0], [])
