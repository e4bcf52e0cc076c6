"""The kernels' twins in plain torch: same names, same signatures, readable, slow."""

from __future__ import annotations

import torch

from vllm_redrafter.kernels.batch import AttentionOptions, TreeBatch


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
