"""Token trees for the adapter's tests, in the core's form and as the lists that the adapter keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tests.core.naive import Prefix
from vllm_redrafter.adapter.tree_batch import DraftTree
from vllm_redrafter.core.token_tree import TokenTree, best_nodes, merge


def random_tree(rng: np.random.Generator, num_nodes: int, width: int, length: int, vocab_size: int = 5) -> TokenTree:
    """Return a tree of at most `num_nodes` nodes out of `width` random beams, which share prefixes at random."""
    beams = torch.from_numpy(rng.integers(vocab_size, size=(1, width, length)))
    # the same for beams that share a prefix, as a drafter's scores are
    step = rng.exponential(size=(length, vocab_size)) + 1e-3
    steps = step[np.arange(length), beams.numpy()]
    return best_nodes(torch.tensor([0]), merge(beams, torch.from_numpy(-steps.cumsum(axis=-1)).float()), num_nodes)


def draft_tree(tree: TokenTree) -> DraftTree:
    """Return a batch of one as the adapter keeps it."""
    size = 1 + int(tree.num_nodes[0])
    columns = (tree.token_ids[0, 1:size], tree.parents[0, :size], tree.depths[0, :size], tree.log_probs[0, 1:size])
    return DraftTree(*(column.tolist() for column in columns))


def tree_of(paths: Sequence[Prefix]) -> DraftTree:
    """Return the tree of some paths, depth first, children in the order in which the paths name them."""
    nodes: list[Prefix] = [()]

    def visit(prefix: Prefix) -> None:
        size = len(prefix) + 1
        for child in dict.fromkeys(path[:size] for path in paths if len(path) >= size and path[: size - 1] == prefix):
            nodes.append(child)
            visit(child)

    visit(())
    parents = [-1] + [nodes.index(node[:-1]) for node in nodes[1:]]
    return DraftTree([node[-1] for node in nodes[1:]], parents, [len(node) for node in nodes], [])


def prefixes(tree: DraftTree) -> list[Prefix]:
    """Return the prefix of every node, the root's first."""
    found: list[Prefix] = [()]
    for node in range(1, len(tree.parents)):
        found.append((*found[tree.parents[node]], tree.token_ids[node - 1]))
    return found
