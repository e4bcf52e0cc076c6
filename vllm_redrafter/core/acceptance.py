"""Lossless acceptance: walk down the tree with tokens that the target itself draws.

At every node a token is drawn from the target's own distribution there; while it is the token of a child the walk steps
down, and the first token that is not ends it. The tokens drawn are an autoregressive sample by construction, whatever
the tree, so no ratio test between drafter and target is needed. For a tree that is a function of the context alone the
chance to step down is the sum of the children's probabilities, which no rule can beat. A tree may know more than that:
the very noise that the token is drawn with (`core.noise`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_redrafter.core.token_tree import TokenTree

Draw = Callable[[torch.Tensor], torch.Tensor]
"""Draws one token of the target per row, given the node [batch] at which every row stands; called once per depth."""


class Walk(NamedTuple):
    """What a verification yields per row: the accepted drafts and one token more."""

    token_ids: torch.Tensor  # [batch, 1 + max depth]: accepted tokens, then the bonus token, then -1
    nodes: torch.Tensor  # [batch, 1 + max depth]: root, accepted nodes, then -1; token i was drawn at nodes[i]
    num_accepted: torch.Tensor  # [batch]: drafts accepted, the bonus token not counted


def walk(tree: TokenTree, draw: Draw) -> Walk:
    """Return the tokens that the target emits for every row of the batch."""
    batch_size = len(tree.token_ids)
    nodes = torch.zeros(batch_size, dtype=torch.int64, device=tree.token_ids.device)
    alive = torch.ones(batch_size, dtype=torch.bool, device=tree.token_ids.device)
    token_columns: list[torch.Tensor] = []
    node_columns: list[torch.Tensor] = []
    while True:
        tokens = draw(nodes)
        token_columns.append(tokens.masked_fill(~alive, -1))
        node_columns.append(nodes.masked_fill(~alive, -1))
        found, child = find_child(tree, nodes, tokens)
        alive = alive & found
        # waits for the device: the loop is as long as the deepest accepted path
        if not bool(alive.any()):
            break
        nodes = torch.where(alive, child, nodes)
    token_ids = torch.stack(token_columns, dim=1)
    return Walk(token_ids, torch.stack(node_columns, dim=1), (token_ids >= 0).sum(dim=1) - 1)


def greedy_walk(tree: TokenTree, choices: torch.Tensor) -> Walk:
    """Return the walk of a target whose best token after node i is `choices[:, i]`, [batch, 1 + N]."""
    rows = torch.arange(len(choices), device=choices.device)
    return walk(tree, lambda nodes: choices[rows, nodes])


def find_child(tree: TokenTree, nodes: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether the children of `nodes` [batch] have one that carries `tokens` [batch], and its index."""
    matches = (tree.parents == nodes[:, None]) & (tree.token_ids == tokens[:, None])
    return matches.any(dim=1), matches.int().argmax(dim=1)
