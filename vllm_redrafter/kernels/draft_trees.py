"""The trees to verify, of all requests at once, from the candidates that a beam search found: one program per request.

Rows stand for the root, row 0, and for the best candidates, best first, so that parents stand before children. The
tree's nodes are laid out depth first, the best child first, as `core.token_tree` says:

* a row's lineage is itself and what is above it, found in rounds that each look twice as far up;
* a row's step is 1 and the sizes of the subtrees of its better siblings: what lies between its parent and itself;
* a row's place is the sum of the steps from the root down to it, and there its node is stored.

Every request gets exactly N nodes: where a tree has fewer, the rest is padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_redrafter.core.beam_search import Candidates
from vllm_redrafter.core.config import check_num_nodes
from vllm_redrafter.kernels.batch import PaddedTrees
from vllm_redrafter.kernels.launch import Launch


def draft_trees(
    init_ids: torch.Tensor,  # [batch] int64: the roots' tokens
    candidates: Candidates,  # no two of a row of the same prefix, and none more probable than what it continues
    is_linear: torch.Tensor,  # [batch] bool: requests that get the best path alone
    out: PaddedTrees,
) -> None:
    """Write the trees of the N most probable candidates to `out`, without waiting for the device.

    Raises:
        ValueError: the number of nodes is out of range, or tensors are of different batches or not contiguous.
    """
    plan(init_ids, candidates, is_linear, out).run()


def plan(init_ids: torch.Tensor, candidates: Candidates, is_linear: torch.Tensor, out: PaddedTrees) -> Launch:
    """Return the launch of `draft_trees`."""
    num_nodes = out.parents.shape[1] - 1
    check_num_nodes(num_nodes)
    batch_size, num_candidates = candidates.log_probs.shape
    tensors = (init_ids, *candidates, is_linear, *out)
    if [len(tensor) for tensor in tensors] != [batch_size] * len(tensors) or not all(map(_is_contiguous, tensors)):
        raise ValueError(
            f"init_ids, candidates, is_linear and out are of {[tuple(tensor.shape) for tensor in tensors]}, or not "
            "contiguous: pass contiguous tensors of one batch"
        )
    padded_rows = triton.next_power_of_2(1 + num_nodes)
    return Launch(
        _draft_kernel,
        (batch_size,),
        {
            "init_ids": init_ids,
            "token_ids": candidates.token_ids,
            "parents": candidates.parents,
            "log_probs": candidates.log_probs,
            "is_linear": is_linear,
            **{f"out_{name}": tensor for name, tensor in out._asdict().items()},
            "num_candidates": num_candidates,
            "num_nodes": num_nodes,
            "PADDED_CANDIDATES": triton.next_power_of_2(num_candidates),
            "PADDED_ROWS": padded_rows,
            "NUM_ROUNDS": (padded_rows - 1).bit_length(),
        },
        # one warp needs no barriers, but cannot hold the largest tiles
        num_warps=1 if padded_rows <= 32 else 8,
    )


def _is_contiguous(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous()


# searches differ in length: that must not call for another binary
@triton.jit(do_not_specialize=["num_candidates", "num_nodes"])
def _draft_kernel(
    init_ids,
    token_ids,
    parents,
    log_probs,
    is_linear,
    out_token_ids,
    out_parents,
    out_depths,
    out_ancestors,
    num_candidates,
    num_nodes,
    PADDED_CANDIDATES: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    NUM_ROUNDS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    first = request * num_candidates
    candidate = tl.arange(0, PADDED_CANDIDATES)
    left = tl.load(log_probs + first + candidate, mask=candidate < num_candidates, other=float("-inf"))
    # NaN, which is neither more nor less than anything, counts as no candidate
    left = tl.where(left > float("-inf"), left, float("-inf"))

    # a row's candidate; -1 is the root, as among parents, and -2 none
    row = tl.arange(0, PADDED_ROWS)
    chosen = tl.where(row == 0, -1, -2)
    peaks = tl.where(row == 0, 0.0, float("-inf"))
    for rank in range(1, num_nodes + 1):
        peak, best = tl.max(left, axis=0, return_indices=True)
        chosen = tl.where(row == rank, best, chosen)
        peaks = tl.where(row == rank, peak, peaks)
        left = tl.where(candidate == best, float("-inf"), left)
    exists = peaks > float("-inf")
    chosen = tl.where(exists, chosen, -2)
    init_id = tl.load(init_ids + request)
    token = tl.load(token_ids + first + chosen, mask=chosen >= 0, other=init_id)
    continued = tl.load(parents + first + chosen, mask=chosen >= 0, other=-3).to(tl.int32)
    # the root is its own parent, and rows without a candidate are its last children: they go behind everything
    parent = tl.max(tl.where(continued[:, None] == chosen[None, :], row[None, :], 0), axis=1)

    words = tl.full([PADDED_ROWS], 1, dtype=tl.int64) << row
    above = parent
    for _ in range(NUM_ROUNDS):
        words |= tl.gather(words, above, axis=0)
        above = tl.gather(above, above, axis=0)
    # [i, j]: row j is above row i, or i itself
    lineage = (words[:, None] >> row[None, :].to(tl.int64)) & 1 != 0

    sizes = tl.sum(lineage.to(tl.int32), axis=0)
    better_sibling = (parent[:, None] == parent[None, :]) & (row[:, None] > row[None, :]) & (row > 0)[None, :]
    steps = 1 + tl.sum(tl.where(better_sibling, sizes[None, :], 0), axis=1)
    places = tl.sum(tl.where(lineage, steps[None, :], 0), axis=1) - 1
    depths = tl.sum(lineage.to(tl.int32), axis=1) - 1
    bits = tl.full([PADDED_ROWS], 1, dtype=tl.int64) << places
    ancestors = tl.sum(tl.where(lineage, bits[None, :], 0), axis=1)
    parent_places = tl.where(row == 0, -1, tl.gather(places, parent, axis=0))

    # on the first path, and nowhere else, everything that stands before a node is above it
    is_drafted = exists & (token >= 0) & ((tl.load(is_linear + request) == 0) | (places == depths))
    out = request * (num_nodes + 1) + places
    in_tree = places <= num_nodes
    tl.store(out_token_ids + out, tl.where(is_drafted, token, init_id), mask=in_tree)
    tl.store(out_parents + out, tl.where(is_drafted, parent_places, -1).to(tl.int64), mask=in_tree)
    tl.store(out_depths + out, tl.where(is_drafted, depths, 0).to(tl.int64), mask=in_tree)
    tl.store(out_ancestors + out, tl.where(is_drafted, ancestors, 0), mask=in_tree)
