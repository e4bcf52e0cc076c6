"""The trees of a batch in a shape that depends on nothing: what a CUDA graph can hold and the scheduler can cut.

Every request gets exactly N draft tokens. Where a tree has fewer nodes, the rest is padding: the root's token again,
which is a valid id, with no parent, so that no walk reaches it, and with no ancestors, so that its row attends to
nothing. Nodes stand before their children and padding stands last: any prefix is a tree.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from vllm_redrafter.core import beam_search, token_tree
from vllm_redrafter.core.beam_search import SHARPNESS, BeamShape, Choose, Foresight, best_continuations
from vllm_redrafter.core.drafter import Embed, ReDrafter


class DraftTrees(NamedTuple):
    """One tree of N nodes per request; node 0 is the root."""

    token_ids: torch.Tensor  # [batch, 1 + N]: the root's token first
    parents: torch.Tensor  # [batch, 1 + N]: -1 at the root and in padding
    depths: torch.Tensor  # [batch, 1 + N]: 0 at the root and in padding
    ancestors: torch.Tensor  # [batch, 1 + N] int64: bit j of word i is set where node i sees node j; 0 in padding


def draft(
    drafter: ReDrafter,
    embed: Embed,
    hidden: torch.Tensor,  # [batch, hidden_size]
    init_ids: torch.Tensor,  # [batch]
    is_linear: torch.Tensor,  # [batch] bool: requests that get the best path alone
    shape: BeamShape,
    num_nodes: int,
    foresight: Foresight | None = None,
    choose: Choose = best_continuations,
) -> DraftTrees:
    """Return the trees of the `num_nodes` most probable continuations, without waiting for the device.

    Args:
        foresight: of what sampling will draw.
        choose: what finds the best continuations at a depth.
    """
    num_candidates = num_nodes if shape.width > 1 else 1
    candidates = beam_search.search(
        drafter,
        embed,
        hidden,
        init_ids,
        shape,
        num_candidates,
        sharpness=SHARPNESS,
        foresight=foresight,
        choose=choose,
    )
    tree = token_tree.best_nodes(init_ids, candidates, num_nodes)
    # the first path of a depth-first layout is the best one
    follows = tree.parents == torch.arange(-1, tree.parents.shape[1] - 1, device=hidden.device)
    on_first_path = follows.cumprod(dim=1).bool()
    is_padding = is_linear[:, None] & ~on_first_path | (tree.token_ids < 0)
    is_padding = functional.pad(is_padding, (0, 1 + num_nodes - is_padding.shape[1]), value=True)

    def padded(values: torch.Tensor, padding: int) -> torch.Tensor:
        wide = functional.pad(values, (0, 1 + num_nodes - values.shape[1]))
        return wide.masked_fill(is_padding, padding)

    return DraftTrees(
        torch.where(is_padding, init_ids[:, None], padded(tree.token_ids, 0)),
        padded(tree.parents, -1),
        padded(tree.depths, 0),
        padded(tree.ancestors, 0),
    )
