"""Token trees: continuations merged on shared prefixes, laid out so that every prefix of the layout is a tree too.

Node 0 is the root, the token that the target has already chosen. The other nodes follow depth first, the best child
first. That order gives three things: a parent stands before its children, the last node of a path has the highest
index of its path, and the most probable path comes first, so that its keys and values need no move.

A tree is laid out on the host, from the few numbers that the search hands over: the host waits for those in any case.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_port.config import check_num_nodes


class TokenTree(NamedTuple):
    """A root and N nodes."""

    token_ids: list[int]  # [1 + N]: the root's token first
    parents: list[int]  # [1 + N]: index of the parent, -1 at the root
    depths: list[int]  # [1 + N]: 0 at the root
    ancestors: list[int]  # [1 + N]: bit j is set where node j is an ancestor or the node itself
    log_probs: list[float]  # [1 + N]: the drafter's cumulative log-probability; 0 at the root

    def path(self, node: int) -> list[int]:
        """Return the tokens from the root to `node`, both included."""
        return [self.token_ids[i] for i in range(node + 1) if self.ancestors[node] >> i & 1]


def best_nodes(
    init_id: int,
    token_ids: Sequence[int],  # [C], parents before children
    parents: Sequence[int],  # [C]: -1 for the root
    log_probs: Sequence[float],  # [C]; -inf where there is no candidate
    num_nodes: int,
    max_depth: int | None = None,
) -> TokenTree:
    """Return the tree of the `num_nodes` most probable candidates that are no deeper than `max_depth`.

    A continuation is never more probable than what it continues, so the best candidates always form a tree.

    Raises:
        ValueError: the budget is out of range.
    """
    check_num_nodes(num_nodes)
    candidate_depths: list[int] = []
    for parent in parents:
        candidate_depths.append(1 if parent < 0 else 1 + candidate_depths[parent])
    usable = [
        i
        for i, log_prob in enumerate(log_probs)
        if log_prob > -math.inf and (max_depth is None or candidate_depths[i] <= max_depth)
    ]
    # a stable sort: among equals the parent, which stands before its child, stays before it
    best = sorted(usable, key=lambda i: -log_probs[i])[:num_nodes]
    children: dict[int, list[int]] = defaultdict(list)
    for i in best:
        children[parents[i]].append(i)

    tree = TokenTree([init_id], [-1], [0], [1], [0.0])
    # what is still to be laid out, the next one last: (candidate, its parent's node)
    waiting = [(i, 0) for i in reversed(children[-1])]
    while waiting:
        i, parent = waiting.pop()
        node = len(tree.token_ids)
        tree.token_ids.append(token_ids[i])
        tree.parents.append(parent)
        tree.depths.append(candidate_depths[i])
        tree.ancestors.append(tree.ancestors[parent] | 1 << node)
        tree.log_probs.append(log_probs[i])
        waiting += [(child, node) for child in reversed(children[i])]
    return tree


def chain(token_ids: Sequence[int]) -> TokenTree:  # [1 + N]
    """Return the tree of one path, given its tokens with the root's first."""
    size = len(token_ids)
    return TokenTree(
        list(token_ids),
        list(range(-1, size - 1)),
        list(range(size)),
        [(2 << i) - 1 for i in range(size)],
        [0.0] * size,
    )


def attention_mask(tree: TokenTree) -> mx.array:
    """Return which node may look at which, [1 + N, 1 + N]: row i holds i's ancestors and i."""
    size = len(tree.token_ids)
    # node 63's bit is the sign
    ancestors = mx.array([bits - (bits >> 63 << 64) for bits in tree.ancestors], mx.int64)
    return (ancestors[:, None] >> mx.arange(size, dtype=mx.int64) & 1).astype(mx.bool_)
