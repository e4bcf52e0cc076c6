"""What an attention program does with one tile of keys: find them, load them, score them, add them up."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(block_row, positions, kv_len, BLOCK_SIZE: tl.constexpr):
    """Return block and slot of `positions`, [BLOCK_KV, 1] int64 each, by a row of the block table."""
    blocks = tl.load(block_row + positions // BLOCK_SIZE, mask=positions < kv_len, other=0)
    return blocks.to(tl.int64)[:, None], (positions % BLOCK_SIZE).to(tl.int64)[:, None]


@triton.jit
def load(pointers, in_cache, in_head):
    """Return keys or values as they are stored, [BLOCK_KV, PADDED_HEAD]; 0 outside cache and head."""
    return tl.load(pointers, mask=in_cache[:, None] & in_head[None, :], other=0.0)


@triton.jit
def scores(q, k, scale, SOFT_CAP: tl.constexpr):
    """Return the scores times log2(e), [BLOCK_M, BLOCK_KV]."""
    # "ieee": tf32 would lose what an fp32 model promises
    products = tl.dot(q, tl.trans(_widened(k, q.dtype)), input_precision="ieee")
    if SOFT_CAP > 0:
        # c tanh(x / c) = c - 2c / (1 + e^(2x / c)), and e^y = 2^(y log2(e))
        products = SOFT_CAP - 2 * SOFT_CAP / (1 + tl.exp2(products * (scale * 2.8853900817779268 / SOFT_CAP)))
        return products * 1.4426950408889634
    return products * (scale * 1.4426950408889634)


@triton.jit
def accumulate(acc, total, peak, scores, v, dtype: tl.constexpr):
    """Return the online softmax after one more tile: weighted values, sum of weights, highest score."""
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    # a row that has seen nothing yet has no peak to subtract
    base = tl.where(new_peak > float("-inf"), new_peak, 0.0)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(peak - base)
    acc = tl.dot(weights.to(dtype), _widened(v, dtype), acc * decay[:, None], input_precision="ieee")
    return acc, total * decay + tl.sum(weights, axis=1), new_peak


@triton.jit
def popcount(words):
    """Return the number of bits set in words of 64 bits, by sums of neighbours that double in width."""
    bits = words.to(tl.uint64, bitcast=True)
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    return ((bits + (bits >> 32)) & 0x7F).to(tl.int32)


@triton.jit
def _widened(x, dtype: tl.constexpr):
    """Return cache entries in the query's type; bytes are e4m3, whose bits are those of fp16 but for the bias."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        x = half.to(tl.float16, bitcast=True) * 256.0
    return x.to(dtype)
