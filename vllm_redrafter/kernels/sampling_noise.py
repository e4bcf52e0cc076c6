"""The noise that sampling adds under vLLM's model runner V2, for a drafter that knows it before the target runs.

It is a function of a request's seed, a position and a token, by the same arithmetic as there: with u the hash
(MurmurHash3, 32 bits) of seed, position and token, moved by one half and divided by 2^32, it is -ln(-ln(1 - u)), Gumbel
noise. What a drafter gains by it: `core.noise`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_redrafter.kernels.launch import Launch

_BLOCK = 1024


def sampling_noise(
    positions: torch.Tensor,  # [num_rows] int64: of the tokens after which is drawn
    temperatures: torch.Tensor,  # [num_rows] fp32
    seeds: torch.Tensor,  # [num_rows] int64
    token_ids: torch.Tensor,  # [num_tokens] int64: those that it is wanted for
    depth: int = 0,  # added to all positions
) -> torch.Tensor:
    """Return what is added to logits that were not divided by the temperature, [num_rows, num_tokens] fp32.

    It is the noise times the temperature, so 0 for greedy requests.
    """
    launch = plan(positions, temperatures, seeds, token_ids, depth)
    launch.run()
    added: torch.Tensor = launch.arguments["out"]
    return added


def plan(
    positions: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, token_ids: torch.Tensor, depth: int = 0
) -> Launch:
    """Return the launch of `sampling_noise`."""
    num_rows, num_tokens = len(positions), len(token_ids)
    return Launch(
        _noise_kernel,
        (num_rows, triton.cdiv(num_tokens, _BLOCK)),
        {
            "positions": positions,
            "temperatures": temperatures,
            "seeds": seeds,
            "token_ids": token_ids,
            "out": temperatures.new_empty(num_rows, num_tokens, dtype=torch.float32),
            "depth": depth,
            "num_tokens": num_tokens,
            "BLOCK": _BLOCK,
        },
    )


# depths differ: that must not call for another binary
@triton.jit(do_not_specialize=["depth"])
def _noise_kernel(positions, temperatures, seeds, token_ids, out, depth, num_tokens, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = place < num_tokens
    temperature = tl.load(temperatures + row)
    added = tl.zeros([BLOCK], dtype=tl.float32)
    if temperature != 0.0:
        token = tl.load(token_ids + place, mask=exists, other=0)
        added = temperature * gumbel(tl.load(seeds + row), tl.load(positions + row) + depth, token)
    tl.store(out + row * num_tokens + place, added, mask=exists)


@triton.jit
def gumbel(seed, position, token):
    """Return the noise of tokens [BLOCK] at one position of a request."""
    state = _mixed(tl.full([], 0, dtype=tl.uint32), seed.to(tl.uint32))
    state = _mixed(state, (seed >> 32).to(tl.uint32))
    # four words went in, and the low one of a position is all that counts
    state = _mixed(_mixed(state, position.to(tl.uint32)), token.to(tl.uint32))
    state = state ^ 16
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    state = state ^ (state >> 16)
    # in halves, so that neither is rounded before the sum is
    high = (state >> 16).to(tl.int32).to(tl.float32)
    low = (state & 0xFFFF).to(tl.int32).to(tl.float32)
    u = high * 1.52587890625e-05 + (low + 0.5) * 2.3283064365386963e-10
    # ln(1 - u) by its series where u is small: that is the noise that wins
    series = 0.125
    for power in tl.static_range(7, 0, -1):
        series = 1.0 / power + u * series
    log = tl.where(u < 0.25, -u * series, tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08)))
    return -tl.log(-log)


@triton.jit
def _mixed(state, word):
    """Return MurmurHash3's state after one more word."""
    word = word * 0xCC9E2D51
    word = ((word << 15) | (word >> 17)) * 0x1B873593
    state = state ^ word
    return ((state << 13) | (state >> 19)) * 5 + 0xE6546B64
