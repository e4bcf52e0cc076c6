"""What the trees of one step look like inside vLLM's flat batch: rows, segments, positions."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from vllm_redrafter.adapter.attention_rounds import Segment
from vllm_redrafter.core.beam_search import Candidates
from vllm_redrafter.kernels.batch import MAX_ROWS, ancestor_words


class DraftTree(NamedTuple):
    """The tree proposed to one request, as plain lists; node 0 is the root."""

    token_ids: list[int]
    """Tokens of the nodes after the root, as the scheduler sees them."""
    parents: list[int]
    """Parent of every node, the root included (-1)."""
    depths: list[int]
    """Depth of every node, the root included (0)."""
    scores: list[float]
    """The drafter's cumulative log-probability of every node after the root; empty where it did not propose them."""

    def first(self, size: int) -> DraftTree:
        """Return the tree of the first `size` nodes, the root included."""
        return DraftTree(self.token_ids[: size - 1], self.parents[:size], self.depths[:size], self.scores[: size - 1])

    def children(self) -> dict[tuple[int, int], int]:
        """Return the nodes by parent and token."""
        edges = zip(self.parents[1:], self.token_ids, strict=True)
        return {edge: node for node, edge in enumerate(edges, start=1)}


ROOT = DraftTree([], [-1], [0], [])
"""The tree of a request without drafts."""


def chain_of(token_ids: list[int]) -> DraftTree:
    """Return the tree of one path."""
    size = len(token_ids) + 1
    return DraftTree(token_ids, list(range(-1, size - 1)), list(range(size)), [])


def best_tree(
    token_ids: Sequence[int], parents: Sequence[int], log_probs: Sequence[float], num_nodes: int
) -> DraftTree:
    """Return the tree of the `num_nodes` most probable candidates: `core.token_tree.best_nodes` for one request.

    Args:
        token_ids, parents, log_probs: a row of `core.beam_search.Candidates`.
    """
    best_first = sorted(range(len(log_probs)), key=log_probs.__getitem__, reverse=True)
    children: dict[int, list[int]] = {}
    for candidate in best_first[:num_nodes]:
        if log_probs[candidate] > -math.inf:
            children.setdefault(parents[candidate], []).append(candidate)
    tree = DraftTree([], [-1], [0], [])
    waiting = [(candidate, 0) for candidate in reversed(children.get(-1, []))]  # with their parents' nodes
    while waiting:
        candidate, parent = waiting.pop()
        node = len(tree.parents)
        tree.token_ids.append(token_ids[candidate])
        tree.parents.append(parent)
        tree.depths.append(tree.depths[parent] + 1)
        tree.scores.append(log_probs[candidate])
        waiting += [(child, node) for child in reversed(children.get(candidate, []))]
    return tree


def best_path(parents: Sequence[int]) -> list[int]:
    """Return the candidates on a request's path of best children, given the parents of all its candidates."""
    path = [-1]
    while path[-1] in parents:
        # within a depth the best candidate comes first
        path.append(parents.index(path[-1]))
    return path[1:]


def along(candidates: Candidates, paths: Sequence[Sequence[int]]) -> Candidates:
    """Return the candidates of which only those on `paths` are left.

    The others keep their places, with a log-probability of -inf.

    Args:
        paths: by request, places among its candidates.
    """
    log_probs = torch.full_like(candidates.log_probs, -torch.inf)
    for kept, all_of_them, path in zip(log_probs, candidates.log_probs, paths, strict=True):
        kept[path] = all_of_them[path]
    return candidates._replace(log_probs=log_probs)


class TreeBatch(NamedTuple):
    """The trees that one forward pass verifies; requests without drafts have a tree of the root alone."""

    trees: list[DraftTree]
    """One per request of the batch, cut to what was scheduled."""
    root_rows: list[int]
    """Row of every root in the batch."""
    logit_rows: list[int]
    """Row of every root among the rows that logits are computed for."""
    num_nodes: int
    """Drafts to verify, summed over the trees."""
    num_branching: int
    """Trees that are not chains."""
    num_truncated: int
    """Trees of which the scheduler cut nodes off."""
    num_replaced: int
    """Drafts that are not the ones proposed (vLLM's padding), verified as chains."""

    def requests(self, query_ends: Sequence[int], num_computed: Sequence[int]) -> list[Segment]:
        """Return all rows of every request as one segment each, whose keys and values stand in the linear slots.

        Args:
            query_ends: row behind the last of every request.
            num_computed: tokens of every request that are cached before this step.
        """
        starts = [0, *query_ends[:-1]]
        return [
            Segment(request, start, end, computed + end - start)
            for request, (start, end, computed) in enumerate(zip(starts, query_ends, num_computed, strict=True))
        ]

    def ancestors(self, query_ends: Sequence[int]) -> list[list[int]] | None:
        """Return for every row of every request the word of the rows of this step that it sees (`kernels.batch`).

        None of them for a request whose rows are more than a word has bits and a chain; None at all where such rows
        branch.

        Args:
            query_ends: row behind the last of every request.
        """
        words = []
        for tree, root_row, start, end in zip(
            self.trees, self.root_rows, [0, *query_ends[:-1]], query_ends, strict=True
        ):
            num_before = root_row - start  # rows of the prompt
            if end - start <= MAX_ROWS:
                in_tree = (num_before + parent for parent in tree.parents[1:])
                words.append(ancestor_words([*range(-1, num_before), *in_tree]))
            elif len(path_segments(tree.parents)) == 1:
                words.append([])
            else:
                return None
        return words

    def segments(self, query_ends: Sequence[int], num_computed: Sequence[int]) -> list[list[Segment]]:
        """Return every request's segments, first path first.

        Args:
            query_ends: row behind the last of every request.
            num_computed: tokens of every request that are cached before this step.
        """
        segments: list[list[Segment]] = []
        query_start = 0
        for request, tree in enumerate(self.trees):
            root_row = self.root_rows[request]
            context = num_computed[request] + root_row - query_start  # tokens before the root
            standing = list(range(len(tree.parents)))  # the node at every depth: vLLM has written node i as depth i
            served: list[Segment] = []
            for start, end in reversed(path_segments(tree.parents)):
                path = enumerate(path_to(tree.parents, end - 1))
                missing = [(node, depth) for depth, node in path if standing[depth] != node]
                for node, depth in missing:
                    standing[depth] = node
                served.append(
                    Segment(
                        request,
                        root_row + start if start > 0 else query_start,
                        root_row + end,
                        context + tree.depths[end - 1] + 1,
                        tuple(root_row + node for node, _ in missing),
                        tuple(root_row + depth for _, depth in missing),
                    )
                )
            segments.append(served[::-1])
            query_start = query_ends[request]
        return segments


def assemble(
    proposed: Mapping[str, DraftTree],
    request_ids: Sequence[str],
    scheduled: Mapping[str, list[int]],
    query_ends: Sequence[int],
) -> TreeBatch:
    """Return the trees of a step.

    Args:
        proposed: the trees of the last proposal, by request.
        request_ids: the requests of the batch, in its order.
        scheduled: the draft tokens that the scheduler let through, by request: a prefix of the proposal, or padding.
        query_ends: row behind the last of every request.
    """
    trees, root_rows, logit_rows = [], [], []
    num_logits = num_truncated = num_replaced = 0
    for request_id, query_end in zip(request_ids, query_ends, strict=True):
        tokens = scheduled.get(request_id, [])
        tree = proposed.get(request_id)
        if not tokens:
            trees.append(ROOT)
        elif tree is None or tree.token_ids[: len(tokens)] != tokens:
            num_replaced += 1
            trees.append(chain_of(tokens))
        else:
            size = len(tokens) + 1
            num_truncated += size < len(tree.parents)
            trees.append(tree.first(size))
        root_rows.append(query_end - 1 - len(tokens))
        logit_rows.append(num_logits)
        num_logits += 1 + len(tokens)
    num_branching = sum(len(path_segments(tree.parents)) > 1 for tree in trees)
    num_nodes = num_logits - len(trees)
    return TreeBatch(trees, root_rows, logit_rows, num_nodes, num_branching, num_truncated, num_replaced)


@functools.cache
def of_roots(num_requests: int) -> TreeBatch:
    """Return the trees of a step with one row per request: nothing is verified."""
    rows = list(range(num_requests))
    return TreeBatch([ROOT] * num_requests, rows, rows, 0, 0, 0, 0)


def path_segments(parents: Sequence[int]) -> list[tuple[int, int]]:
    """Return [start, end) of every root-to-leaf path's new nodes, for nodes laid out depth first."""
    starts = [node for node, parent in enumerate(parents) if parent != node - 1]
    return list(zip([0, *starts], [*starts, len(parents)], strict=True))


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """Return the nodes from the root to `node`, both included."""
    path = [node]
    while path[-1] != 0:
        path.append(parents[path[-1]])
    return path[::-1]
