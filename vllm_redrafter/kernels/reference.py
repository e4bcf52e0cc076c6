"""The kernels' twins in plain torch: same names, same signatures, readable, slow."""

from __future__ import annotations

import torch
from torch.nn import functional

from vllm_redrafter.core import drafter, token_tree
from vllm_redrafter.core.acceptance import Walk
from vllm_redrafter.core.beam_search import Candidates, Continuations, with_noise
from vllm_redrafter.kernels.batch import (
    COUNTED,
    AttentionOptions,
    DraftStarts,
    PaddedTrees,
    RequestStates,
    StepRows,
    TreeBatch,
)
from vllm_redrafter.kernels.caches import LayerCaches


def tree_attention(
    query: torch.Tensor,  # [num_rows, num_heads, head_size]
    key_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_size]
    value_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_size]
    trees: TreeBatch,
    options: AttentionOptions,
    out: torch.Tensor,  # [num_rows, num_heads, head_size]
) -> None:
    """Write the attention of every tree row to `out`, request by request."""
    group = query.shape[1] // key_cache.shape[2]
    block_size = key_cache.shape[1]
    for request, kv_len in enumerate(trees.seq_lens.tolist()):
        first_row, end_row = trees.query_start_loc[request : request + 2].tolist()
        if first_row == end_row:
            continue
        context_len = kv_len - (end_row - first_row)
        positions = torch.arange(kv_len, device=query.device)
        blocks = trees.block_table[request, positions // block_size].long()
        # [num_heads, kv_len, head_size]
        k = key_cache[blocks, positions % block_size].to(query.dtype).repeat_interleave(group, dim=1).transpose(0, 1)
        v = value_cache[blocks, positions % block_size].to(query.dtype).repeat_interleave(group, dim=1).transpose(0, 1)
        if options.k_scale is not None:
            k = k * options.k_scale.to(k.dtype)
        if options.v_scale is not None:
            v = v * options.v_scale.to(v.dtype)
        words = trees.ancestors[request, : end_row - first_row]
        in_tree = (words[:, None] >> torch.arange(len(words), device=words.device) & 1).bool()  # [rows, rows]
        in_context = (words != 0)[:, None].expand(-1, context_len)  # [rows, context]: padding sees nothing
        visible = torch.cat((in_context, in_tree), dim=1)
        if options.sliding_window > 0:
            row_positions = context_len + in_tree.sum(dim=1) - 1
            key_positions = torch.cat((positions[:context_len], row_positions))
            visible &= row_positions[:, None] - key_positions < options.sliding_window
        # [num_heads, rows, kv_len]
        scores = options.scale * query[first_row:end_row].transpose(0, 1) @ k.transpose(1, 2)
        if options.soft_cap > 0:
            scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        # a row of padding has no weights: its softmax is nan
        weights = weights.masked_fill(~visible, 0)
        out[first_row:end_row] = (weights @ v).transpose(0, 1)


def commit_kv(
    caches: LayerCaches,
    trees: TreeBatch,
    nodes: torch.Tensor,  # [num_requests, 1 + max depth]: root, accepted nodes, then -1
) -> None:
    """Let slot `context + i` of every cache hold what slot `context + nodes[:, i]` held."""
    block_size = caches.tensors[0].shape[1]
    query_lens = trees.query_start_loc.diff()
    steps = torch.arange(nodes.shape[1], device=nodes.device)
    moves = (nodes > steps) & (nodes < query_lens[:, None])
    requests, steps = moves.nonzero(as_tuple=True)
    context_lens = (trees.seq_lens - query_lens)[requests]

    def slots(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return trees.block_table[requests, positions // block_size].long(), positions % block_size

    sources, targets = slots(context_lens + nodes[requests, steps]), slots(context_lens + steps)
    for cache in caches.tensors:
        cache[targets] = cache[sources]


def target_tokens(
    logits: torch.Tensor,  # [num_rows, vocab_size]
    positions: torch.Tensor,  # [num_rows]
    requests: torch.Tensor,  # [num_rows]: index into temperatures and seeds, -1 for padding
    temperatures: torch.Tensor,  # [max_num_requests]
    seeds: torch.Tensor,  # [max_num_requests]
) -> torch.Tensor:
    """Return the token that the target chooses after every row, [num_rows] int64."""
    greedy = (requests < 0) | (temperatures[requests] == 0)
    noise = _gumbel(seeds[requests], positions, torch.arange(logits.shape[1], device=logits.device))
    return (logits.float() + noise.masked_fill(greedy[:, None], 0)).argmax(dim=1)


def sampling_noise(
    positions: torch.Tensor,  # [num_rows]: of the tokens after which is drawn
    temperatures: torch.Tensor,  # [num_rows]
    seeds: torch.Tensor,  # [num_rows]
    token_ids: torch.Tensor,  # [num_tokens]
    depth: int = 0,  # added to all positions
) -> torch.Tensor:
    """Return what is added to logits that were not divided by the temperature, [num_rows, num_tokens] fp32."""
    # not 0 times the noise: that is NaN where it is infinite
    noise = _gumbel(seeds, positions + depth, token_ids).masked_fill(temperatures[:, None] == 0, 0)
    return temperatures[:, None] * noise


def best_continuations(
    logits: torch.Tensor,  # [batch, beams, head_size]
    scores: torch.Tensor,  # [batch, beams]: cumulative log-probabilities
    num_kept: int,
    noise: torch.Tensor | None = None,  # [batch, head_size]: added to the logits of all beams
    scale: float = 1.0,
) -> Continuations:
    """Return the best `num_kept` continuations, or all where there are fewer; the first of equals comes first."""
    totals = (with_noise(logits, noise, scale).log_softmax(dim=-1) + scores[..., None]).flatten(1)
    best = totals.sort(dim=-1, descending=True, stable=True)
    places = best.indices[:, :num_kept]
    head_size = logits.shape[-1]
    return Continuations(places // head_size, places % head_size, best.values[:, :num_kept])


def draft_trees(
    init_ids: torch.Tensor,  # [batch]: the roots' tokens
    candidates: Candidates,
    is_linear: torch.Tensor,  # [batch] bool: requests that get the best path alone
    out: PaddedTrees,
) -> None:
    """Write the trees of the N most probable candidates to `out`."""
    num_nodes = out.parents.shape[1] - 1
    tree = token_tree.best_nodes(init_ids, candidates, num_nodes)
    # the first path of a depth-first layout is the best one
    follows = tree.parents == torch.arange(-1, tree.parents.shape[1] - 1, device=init_ids.device)
    on_first_path = follows.cumprod(dim=1).bool()
    is_padding = is_linear[:, None] & ~on_first_path | (tree.token_ids < 0)
    is_padding = functional.pad(is_padding, (0, 1 + num_nodes - is_padding.shape[1]), value=True)

    def padded(values: torch.Tensor, padding: int) -> torch.Tensor:
        wide = functional.pad(values, (0, 1 + num_nodes - values.shape[1]))
        return wide.masked_fill(is_padding, padding)

    out.token_ids.copy_(torch.where(is_padding, init_ids[:, None], padded(tree.token_ids, 0)))
    out.parents.copy_(padded(tree.parents, -1))
    out.depths.copy_(padded(tree.depths, 0))
    out.ancestors.copy_(padded(tree.ancestors, 0))


def silu_of_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:  # both of one shape
    """Return `SiLU(a + b)`."""
    return drafter.silu_of_sum(a, b)


def plus_silu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # both of one shape
    """Return `x + SiLU(y)`."""
    return drafter.plus_silu(x, y)


def store_trees(
    trees: PaddedTrees,  # of a batch
    slots: torch.Tensor,  # [batch]
    num_sampled: torch.Tensor,  # [batch]: 0 where a request is in the middle of its prompt, and has no tree
    kept: PaddedTrees,  # by slot; tokens are not kept
) -> None:
    """Write what the nodes of trees are to each other to their slots, or the root alone."""
    is_drafted = (num_sampled > 0)[:, None]
    is_root = torch.arange(trees.parents.shape[1], device=slots.device) == 0
    kept.parents[slots] = trees.parents.masked_fill(~is_drafted, -1)
    kept.depths[slots] = trees.depths.masked_fill(~is_drafted, 0)
    kept.ancestors[slots] = trees.ancestors.masked_fill(~(is_drafted | is_root), 0)


def tree_positions(
    slots: torch.Tensor,  # [num_logits]: whose every row of logits is
    nodes: torch.Tensor,  # [num_logits]: which of its request's rows it is
    logits_indices: torch.Tensor,  # [num_logits]: the row of the batch
    depths: torch.Tensor,  # [max_num_requests, 1 + N]: of the trees, by slot
    positions: torch.Tensor,  # [num_rows]: those of slots; changed
) -> None:
    """Let the rows of trees have the positions of their depths."""
    positions[logits_indices] += depths[slots, nodes] - nodes


def draft_starts(
    hidden: torch.Tensor,  # [num_rows, hidden_size]: the target's last hidden states
    layer_outputs: torch.Tensor | None,  # [>= num_rows, layers * hidden_size]: what left the fused layers
    rows: StepRows,
    states: RequestStates,
    as_chains: bool,  # whether all requests get chains
    out: DraftStarts,
) -> None:
    """Write what the next drafts start from, at the last node that every walk accepted."""
    last = rows.logits_indices[rows.cu_num_logits[:-1]].long()
    if rows.nodes is not None:
        last = last + rows.nodes.gather(1, (rows.num_sampled - 1).clamp(min=0).long()[:, None])[:, 0]
    seen = [hidden] if layer_outputs is None else [hidden, layer_outputs]
    out.hidden.copy_(torch.cat([outputs[last] for outputs in seen], dim=1))
    out.init_ids.copy_(states.last_sampled[rows.slots, 0])
    out.is_linear.copy_((states.is_linear[rows.slots] != 0) | as_chains)
    out.positions.copy_(rows.positions[last] + 1)
    out.temperatures.copy_(states.temperatures[rows.slots] * states.is_foreseen[rows.slots])
    out.seeds.copy_(states.seeds[rows.slots])


def verify_walk(
    token_ids: torch.Tensor,  # [num_rows]: the nodes' tokens, tree by tree
    parents: torch.Tensor,  # [max_num_requests, 1 + N]: of the trees, by slot
    slots: torch.Tensor,  # [num_requests]: where a request's tree is
    cu_num_logits: torch.Tensor,  # [num_requests + 1]: where a request's rows begin
    choices: torch.Tensor,  # [num_rows]: the target's token after every row
) -> Walk:
    """Return the walk of every request, [num_requests, 1 + N] wide."""
    walked_tokens = torch.full_like(parents[slots], -1)
    walked_nodes = torch.full_like(walked_tokens, -1)
    for request, (first_row, end_row) in enumerate(zip(cu_num_logits[:-1].tolist(), cu_num_logits[1:], strict=True)):
        chosen, drafted = choices[first_row:end_row], token_ids[first_row:end_row]
        parent = parents[slots[request], : len(chosen)]
        node, depth = 0, 0
        while node < len(chosen):
            walked_tokens[request, depth], walked_nodes[request, depth] = chosen[node], node
            children = ((parent == node) & (drafted == chosen[node])).nonzero()[:, 0].tolist()
            node, depth = min(children, default=len(chosen)), depth + 1
    return Walk(walked_tokens, walked_nodes, (walked_tokens >= 0).sum(dim=1, dtype=torch.int32) - 1)


def count_walks(
    nodes: torch.Tensor,  # [num_requests, 1 + N]: the walks, -1 behind their ends
    parents: torch.Tensor,  # [max_num_requests, 1 + N]: of the trees, by slot; -1 at roots and in padding
    slots: torch.Tensor,  # [num_requests]
    cu_num_logits: torch.Tensor,  # [num_requests + 1]: where a request's rows begin
    sums: torch.Tensor,  # [len(COUNTED) + N] int64: changed
) -> None:
    """Add what the walks of one step did: what `COUNTED` says, then walks that came so deep, by depth."""
    parents = parents[slots]
    node = torch.arange(nodes.shape[1], device=nodes.device)
    is_node = parents >= 0
    is_verified = is_node & (node < cu_num_logits.diff()[:, None])
    is_draft = is_verified.any(dim=1)
    is_moved = (nodes > node).any(dim=1)
    counted = {
        "num_drafts": is_draft,
        "num_draft_tokens": is_verified,
        "num_branching_trees": (is_verified & (parents != node - 1)).any(dim=1),
        "num_truncated_trees": is_draft & (is_node & ~is_verified).any(dim=1),
        "num_branch_acceptances": is_moved,
        "num_commits": is_moved.any(),
    }
    sums[: len(COUNTED)] += torch.stack([counted[name].sum() for name in COUNTED])
    sums[len(COUNTED) :] += (nodes[:, 1:] >= 0).sum(dim=0)


def _gumbel(
    seeds: torch.Tensor,  # [num_rows] int64
    positions: torch.Tensor,  # [num_rows] int64
    token_ids: torch.Tensor,  # [num_tokens] int64
) -> torch.Tensor:
    """Return the noise of every row's tokens, [num_rows, num_tokens]."""
    state = torch.zeros_like(seeds)[:, None]
    for word in (seeds[:, None], seeds[:, None] >> 32, positions[:, None], token_ids):
        mixed = _times(word, 0xCC9E2D51)
        mixed = _times(mixed << 15 | mixed >> 17, 0x1B873593)
        state = state ^ mixed
        state = (_low(state << 13 | state >> 19) * 5 + 0xE6546B64) & 0xFFFFFFFF
    state = state ^ 16
    state = _times(state ^ (state >> 16), 0x85EBCA6B)
    state = _times(state ^ (state >> 13), 0xC2B2AE35)
    state = state ^ (state >> 16)
    u = (state >> 16).float() / 2**16 + ((state & 0xFFFF).float() + 0.5) / 2**32
    # 1 - u is 0 where u is next to 1
    return -(-torch.log1p(-u.clamp(max=1 - 2**-24))).log()


def _times(words: torch.Tensor, factor: int) -> torch.Tensor:
    """Return the low 32 bits of products of 32-bit words."""
    return _low(_low(words) * factor)


def _low(words: torch.Tensor) -> torch.Tensor:
    return words & 0xFFFFFFFF
