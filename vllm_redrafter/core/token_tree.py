"""Token trees: continuations merged on shared prefixes, laid out so that every prefix of the layout is a tree too.

Node 0 is the root, the token that the target has already chosen. The other nodes follow depth first, the best child
first. That order gives three things: a parent stands before its children, so whatever is cut off at the end leaves a
tree; the new nodes of every root-to-leaf path are neighbours; and the most probable path comes first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_redrafter.core.beam_search import Candidates
from vllm_redrafter.core.config import check_num_nodes


class TokenTree(NamedTuple):
    """A batch of trees of at most N nodes after the root; rows behind `num_nodes` are padding (parent -1, token -1)."""

    token_ids: torch.Tensor  # [batch, 1 + N]: the root's token first
    parents: torch.Tensor  # [batch, 1 + N]: index of the parent, -1 at the root
    depths: torch.Tensor  # [batch, 1 + N]: 0 at the root
    ancestors: torch.Tensor  # [batch, 1 + N] int64: bit j is set where node j is an ancestor or the node itself
    num_nodes: torch.Tensor  # [batch]: nodes after the root
    log_probs: torch.Tensor  # [batch, 1 + N]: the drafter's cumulative log-probability; 0 at the root and in padding


def best_nodes(init_ids: torch.Tensor, candidates: Candidates, num_nodes: int) -> TokenTree:
    """Return the trees of the `num_nodes` most probable candidates.

    A continuation is never more probable than what it continues, so the best candidates always form a tree.

    Args:
        init_ids: [batch], the roots' tokens.
        candidates: no two of a row may stand for the same prefix (`merge` sees to that for arbitrary beams).
        num_nodes: the budget, 1..63.

    Raises:
        ValueError: the budget is out of range.
    """
    check_num_nodes(num_nodes)
    kept = min(num_nodes, candidates.token_ids.shape[1])
    # a stable sort: among equals the parent, which stands before its child, stays before it
    order = candidates.log_probs.argsort(dim=1, descending=True, stable=True)[:, :kept]
    rank = torch.full_like(candidates.parents, -1).scatter_(
        1, order, torch.arange(kept, device=order.device).expand_as(order)
    )
    parents = candidates.parents.gather(1, order)
    parents = torch.where(parents < 0, parents, rank.gather(1, parents.clamp(min=0)))  # [batch, kept], by rank
    log_probs = candidates.log_probs.gather(1, order)
    return _depth_first(init_ids, candidates.token_ids.gather(1, order), parents, log_probs)


def merge(beams: torch.Tensor, log_probs: torch.Tensor) -> Candidates:
    """Return the distinct prefixes of arbitrary beams, duplicates included, as candidates for `best_nodes`.

    Args:
        beams: [batch, width, length], the init token not included.
        log_probs: [batch, width, length], cumulative.
    """
    _, width, length = beams.shape
    same_token = beams[:, :, None] == beams[:, None]  # [batch, width, width, length]
    same_prefix = same_token.cumprod(dim=-1).bool()
    owner = same_prefix.int().argmax(dim=2)  # [batch, width, length]: the first beam with that prefix
    is_owner = owner == torch.arange(width, device=beams.device)[None, :, None]
    # column t * width + w holds the prefix of beam w that ends at depth t: parents come before children
    columns = torch.arange(length, device=beams.device)[:, None] * width + owner.transpose(1, 2)
    parents = torch.cat((torch.full_like(columns[:, :1], -1), columns[:, :-1]), dim=1)
    scores = log_probs.masked_fill(~is_owner, float("-inf"))
    return Candidates(beams.transpose(1, 2).flatten(1), parents.flatten(1), scores.float().transpose(1, 2).flatten(1))


def chain(token_ids: torch.Tensor) -> TokenTree:
    """Return the tree of one path, given its tokens with the root's first, [batch, 1 + N]."""
    batch_size, size = token_ids.shape
    positions = torch.arange(size, device=token_ids.device)
    ones = torch.ones(size, dtype=torch.int64, device=token_ids.device)
    return TokenTree(
        token_ids,
        (positions - 1).expand(batch_size, size),
        positions.expand(batch_size, size),
        (ones << positions).cumsum(0).expand(batch_size, size),
        torch.full((batch_size,), size - 1, device=token_ids.device),
        torch.zeros(batch_size, size, device=token_ids.device),
    )


def attention_mask(tree: TokenTree) -> torch.Tensor:
    """Return which node may look at which, [batch, 1 + N, 1 + N]: row i holds i's ancestors and i."""
    size = tree.ancestors.shape[1]
    return (tree.ancestors[..., None] >> torch.arange(size, device=tree.ancestors.device) & 1).bool()


def _depth_first(
    init_ids: torch.Tensor,  # [batch]
    token_ids: torch.Tensor,  # [batch, N], best first
    parents: torch.Tensor,  # [batch, N]: rank of the parent, -1 for the root
    log_probs: torch.Tensor,  # [batch, N], descending; -inf behind the last node
) -> TokenTree:
    """Lay nodes that are sorted best first, and so parents first, out depth first with the best child first."""
    valid = log_probs > float("-inf")
    count, device = token_ids.shape[1], token_ids.device
    ranks = torch.arange(count, device=device)
    # [b, i, j]: j is i's parent or i itself; squared until it says "above i, or i itself"
    above = ((parents[:, :, None] == ranks) | (ranks[:, None] == ranks)).float()
    for _ in range((count - 1).bit_length()):
        above = (above @ above).clamp(max=1)
    lineage = above.bool() & valid[:, :, None]

    sizes = lineage.sum(dim=1)  # [batch, N]: nodes of every subtree
    earlier_sibling = (parents[:, :, None] == parents[:, None]) & (ranks[:, None] > ranks)
    step = 1 + (earlier_sibling * sizes[:, None]).sum(dim=2)  # places from the parent to the node
    positions = (lineage * step[:, None]).sum(dim=2)  # [batch, N], 1-based: the root is node 0
    positions = torch.where(valid, positions, 1 + ranks)

    def laid_out(values: torch.Tensor, root: torch.Tensor, padding: int) -> torch.Tensor:
        out = torch.cat((root[:, None], torch.full_like(values, padding)), dim=1)
        return out.scatter(1, positions, values.masked_fill(~valid, padding))

    parent_positions = torch.where(parents < 0, 0, positions.gather(1, parents.clamp(min=0)))
    bits = torch.ones_like(positions) << positions
    ancestors = 1 + (lineage * bits[:, None]).sum(dim=2)  # the root is everybody's ancestor
    root_of = torch.zeros_like(init_ids)
    return TokenTree(
        laid_out(token_ids, init_ids, -1),
        laid_out(parent_positions, root_of - 1, -1),
        laid_out(lineage.sum(dim=2), root_of, 0),
        laid_out(ancestors, root_of + 1, 0),
        valid.sum(dim=1),
        laid_out(log_probs, torch.zeros_like(log_probs[:, 0]), 0),
    )
