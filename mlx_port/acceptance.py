"""Lossless acceptance: walk down the tree with tokens that the target itself draws.

A beam-searched tree is a deterministic function of the context, so no ratio test is needed. At every node a token is
drawn from the target's own distribution there; while it is the token of a child the walk steps down, and the first
token that is not ends it. The tokens drawn are an autoregressive sample by construction, whatever the tree. Those at
nodes off the path are never looked at.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_port import token_tree
from mlx_port.token_tree import TokenTree


class Walk(NamedTuple):
    """What a verification yields; its length does not depend on how much was accepted."""

    nodes: mx.array  # [1 + max depth]: root, accepted nodes, then the last one again; token i was drawn at nodes[i]
    token_ids: mx.array  # [1 + max depth]: accepted tokens, then the bonus token; undefined behind it
    num_accepted: mx.array  # []: drafts accepted, the bonus token not counted


def walk(tree: TokenTree, choices: mx.array) -> Walk:  # choices: [1 + N], the token drawn at every node
    """Return the tokens that the target emits, without waiting for the device."""
    size = len(tree.token_ids)
    if size == 1:
        return Walk(mx.zeros(1, mx.int32), choices, mx.array(0))
    matches = choices[mx.array(tree.parents[1:])] == mx.array(tree.token_ids[1:], choices.dtype)
    matches = mx.concatenate((mx.array([True]), matches))  # [1 + N]: the parent's draw is this node's token
    # reached is a node whose ancestors all match, and siblings have different tokens: these are one path
    reached = (matches | ~token_tree.attention_mask(tree)).all(axis=1)
    indices = mx.arange(size, dtype=mx.int32)
    last = mx.where(reached, indices, 0).max()
    nodes = mx.minimum(mx.sort(mx.where(reached, indices, size)), last)[: 1 + max(tree.depths)]
    return Walk(nodes, choices[nodes], reached.sum() - 1)
