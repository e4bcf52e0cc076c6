"""The target's tokens at every node, and the walk down the tree that they make.

At temperature 0 a node's token is the most probable one, else the one with the highest logit after Gumbel noise is
added, which makes it a sample (Gumbel-max); the noise is that of `sampling_noise`. A node draws with the position that
its token has in the text, so it draws what decoding without a drafter would draw there, and siblings share their noise
as they share the position.

As every node's token is known beforehand, the walk needs no arithmetic: step to the child that carries the token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_redrafter.core.acceptance import Walk
from vllm_redrafter.kernels.launch import Launch
from vllm_redrafter.kernels.sampling_noise import gumbel

_BLOCK = 2048


def target_tokens(
    logits: torch.Tensor,  # [num_rows, vocab_size], temperature and masks applied
    positions: torch.Tensor,  # [num_rows] int64: of the row's own token, the depth counted and not the slot
    requests: torch.Tensor,  # [num_rows] int32: index into temperatures and seeds, -1 for padding
    temperatures: torch.Tensor,  # [max_num_requests] fp32
    seeds: torch.Tensor,  # [max_num_requests] int64
) -> torch.Tensor:
    """Return the token that the target chooses after every row, [num_rows] int64.

    Rows of padding are greedy.

    Raises:
        ValueError: a row's logits are not contiguous.
    """
    launch = plan_draw(logits, positions, requests, temperatures, seeds)
    launch.run()
    best = launch.arguments["peaks"].argmax(dim=1, keepdim=True)
    tokens: torch.Tensor = launch.arguments["tokens"].gather(1, best)
    return tokens[:, 0]


def verify_walk(
    token_ids: torch.Tensor,  # [num_rows]: the nodes' tokens, tree by tree
    parents: torch.Tensor,  # [max_num_requests, 1 + N] int64: of the trees, by slot
    slots: torch.Tensor,  # [num_requests] int32: where a request's tree is
    cu_num_logits: torch.Tensor,  # [num_requests + 1] int32: where a request's rows begin
    choices: torch.Tensor,  # [num_rows] int64: the target's token after every row
) -> Walk:
    """Return the walk of every request, [num_requests, 1 + N] wide, without waiting for the device.

    A tree whose end was cut off is walked as far as it has rows. A request without rows emits nothing: -1 everywhere,
    in `num_accepted` too, which is int32.
    """
    launch = plan_walk(token_ids, parents, slots, cu_num_logits, choices)
    launch.run()
    return Walk(*(launch.arguments[name] for name in ("out_token_ids", "out_nodes", "out_num_accepted")))


def plan_draw(
    logits: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
) -> Launch:
    """Return the launch of `target_tokens`, which leaves every block's best token."""
    num_rows, vocab_size = logits.shape
    if logits.stride(1) != 1:
        raise ValueError(f"logits have strides {logits.stride()}: pass rows that are contiguous")
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    return Launch(
        _draw_kernel,
        (num_rows, num_blocks),
        {
            "logits": logits,
            "positions": positions,
            "requests": requests,
            "temperatures": temperatures,
            "seeds": seeds,
            "peaks": logits.new_empty(num_rows, num_blocks, dtype=torch.float32),
            "tokens": logits.new_empty(num_rows, num_blocks, dtype=torch.int64),
            "logits_stride": logits.stride(0),
            "num_blocks": num_blocks,
            "vocab_size": vocab_size,
            "BLOCK": _BLOCK,
        },
    )


def plan_walk(
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    slots: torch.Tensor,
    cu_num_logits: torch.Tensor,
    choices: torch.Tensor,
) -> Launch:
    """Return the launch of `verify_walk`."""
    num_requests, max_rows = len(slots), parents.shape[1]
    return Launch(
        _walk_kernel,
        (num_requests,),
        {
            "token_ids": token_ids,
            "parents": parents,
            "slots": slots,
            "cu_num_logits": cu_num_logits,
            "choices": choices,
            "out_token_ids": choices.new_empty(num_requests, max_rows),
            "out_nodes": choices.new_empty(num_requests, max_rows),
            "out_num_accepted": choices.new_empty(num_requests, dtype=torch.int32),
            "parents_stride": parents.stride(0),
            "MAX_ROWS": max_rows,
            "PADDED_ROWS": triton.next_power_of_2(max_rows),
        },
        num_warps=1,
    )


@triton.jit
def _draw_kernel(
    logits,
    positions,
    requests,
    temperatures,
    seeds,
    peaks,
    tokens,
    logits_stride,
    num_blocks,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    in_vocab = token < vocab_size
    values = tl.load(logits + row * logits_stride + token, mask=in_vocab, other=float("-inf")).to(tl.float32)
    request = tl.load(requests + row)
    temperature = tl.load(temperatures + request, mask=request >= 0, other=0.0)
    if temperature != 0.0:
        seed = tl.load(seeds + request, mask=request >= 0, other=0)
        values = values + gumbel(seed, tl.load(positions + row), token)
    peak, index = tl.max(values, axis=0, return_indices=True)
    tl.store(peaks + row * num_blocks + block, peak)
    tl.store(tokens + row * num_blocks + block, (block * BLOCK + index).to(tl.int64))


@triton.jit
def _walk_kernel(
    token_ids,
    parents,
    slots,
    cu_num_logits,
    choices,
    out_token_ids,
    out_nodes,
    out_num_accepted,
    parents_stride,
    MAX_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + request).to(tl.int64)
    first_row = tl.load(cu_num_logits + request).to(tl.int64)
    num_rows = tl.load(cu_num_logits + request + 1) - first_row
    row = tl.arange(0, PADDED_ROWS)
    exists = (row < num_rows) & (row < MAX_ROWS)
    drafted = tl.load(token_ids + first_row + row, mask=exists, other=-1)
    parent = tl.load(parents + slot * parents_stride + row, mask=exists, other=-1)
    choice = tl.load(choices + first_row + row, mask=exists, other=-1)

    walked_tokens = tl.full([PADDED_ROWS], -1, dtype=tl.int64)
    walked_nodes = tl.full([PADDED_ROWS], -1, dtype=tl.int64)
    node = tl.where(num_rows > 0, 0, PADDED_ROWS).to(tl.int32)
    num_tokens = tl.full([], 0, dtype=tl.int32)
    while node < PADDED_ROWS:
        token = tl.sum(tl.where(row == node, choice, 0), axis=0)
        walked_tokens = tl.where(row == num_tokens, token, walked_tokens)
        walked_nodes = tl.where(row == num_tokens, node, walked_nodes)
        num_tokens += 1
        node = tl.min(tl.where((parent == node) & (drafted == token), row, PADDED_ROWS), axis=0)

    in_row = row < MAX_ROWS
    tl.store(out_token_ids + request * MAX_ROWS + row, walked_tokens, mask=in_row)
    tl.store(out_nodes + request * MAX_ROWS + row, walked_nodes, mask=in_row)
    tl.store(out_num_accepted + request, num_tokens - 1)
