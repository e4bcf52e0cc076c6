"""The best continuations of a search's beams: softmax, sum and selection of one depth, in two launches.

With z = logit + noise, a continuation's cumulative log-probability is

    total = scale (z - peak) + (score - ln(sum_t exp(scale (z_t - peak))))        peak = max_t z_t

In a beam it grows with z, so what is best in a run of tokens is the one with the highest z. The K best continuations
lie in those K runs whose best ones are ahead of the other runs': each of these holds one that is ahead of all that lies
outside. So the first launch leaves the highest z of every part of a row, and of every group within a part, besides the
sums of parts. The second, one program per request, chooses K parts, K of their groups, and K of the groups' tokens,
which it reads again. Where totals are equal the first in place is ahead, at every level.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_redrafter.core.beam_search import Continuations
from vllm_redrafter.kernels.batch import MAX_BEAMS
from vllm_redrafter.kernels.launch import Launch

MAX_KEPT = 64
"""Continuations that one call can be asked for."""

_PART = 1024
"""Tokens of a program of the first launch; twice as many, and so on, where a request would have too many parts."""
_MAX_PARTS = 4096
_NONE = tl.constexpr(-(1 << 31))
"""Comes after every total, also after that of a continuation of probability 0."""
_NOWHERE = tl.constexpr((1 << 31) - 1)


def best_continuations(
    logits: torch.Tensor,  # [batch, beams, head_size] fp32, fp16 or bf16, any strides but the last
    scores: torch.Tensor,  # [batch, beams] fp32: cumulative log-probabilities, -inf for a dead beam
    num_kept: int,
    noise: torch.Tensor | None = None,  # [batch, head_size] fp32: added to the logits of all beams
    scale: float = 1.0,
) -> Continuations:
    """Return the best `num_kept` continuations, or all where there are fewer; the first of equals comes first.

    Logits may be -inf, but not all of a beam's.

    Args:
        scale: what logits are multiplied by after the noise is added.

    Raises:
        ValueError: a number is out of range, or shapes or strides do not fit.
    """
    launches = plan(logits, scores, num_kept, noise, scale)
    for launch in launches:
        launch.run()
    return Continuations(*(launches[-1].arguments[f"out_{name}"] for name in Continuations._fields))


def plan(
    logits: torch.Tensor,  # [batch, beams, head_size]
    scores: torch.Tensor,  # [batch, beams]
    num_kept: int,
    noise: torch.Tensor | None = None,  # [batch, head_size]
    scale: float = 1.0,
) -> list[Launch]:
    """Return the launches of `best_continuations`; the outputs are arguments of the second."""
    _check(logits, scores, num_kept, noise, scale)
    batch, num_beams, head_size = logits.shape
    kept = min(num_kept, num_beams * head_size)
    padded_kept, padded_beams = triton.next_power_of_2(kept), triton.next_power_of_2(num_beams)
    part = max(_PART, triton.next_power_of_2(triton.cdiv(head_size * padded_beams, _MAX_PARTS)))
    # as many groups in a part as tokens in a group
    group = 1 << (part.bit_length() - 1) // 2
    num_parts, num_groups = triton.cdiv(head_size, part), triton.cdiv(head_size, group)
    padded_parts = triton.next_power_of_2(num_parts)
    widest = max(padded_beams * padded_parts, padded_kept * part // group)

    group_peaks = scores.new_empty(batch, num_beams, num_groups, dtype=torch.float32)
    part_peaks, part_sums = scores.new_empty(2, batch, num_beams, num_parts, dtype=torch.float32)
    shared = {
        "logits": logits,
        "noise": noise,
        "group_peaks": group_peaks,
        "part_peaks": part_peaks,
        "part_sums": part_sums,
        "scale": float(scale),
        "logits_stride_request": logits.stride(0),
        "logits_stride_beam": logits.stride(1),
        "noise_stride": 0 if noise is None else noise.stride(0),
        "head_size": head_size,
        "num_groups": num_groups,
        "num_parts": num_parts,
        "NUM_BEAMS": num_beams,
        "PART": part,
        "GROUP": group,
    }
    choose = {
        "scores": scores,
        "scores_stride_request": scores.stride(0),
        "scores_stride_beam": scores.stride(1),
        "out_beams": scores.new_empty(batch, kept, dtype=torch.int64),
        "out_draft_ids": scores.new_empty(batch, kept, dtype=torch.int64),
        "out_log_probs": scores.new_empty(batch, kept, dtype=torch.float32),
        "KEPT": kept,
        "PADDED_KEPT": padded_kept,
        "PADDED_BEAMS": padded_beams,
        "PADDED_PARTS": padded_parts,
    }
    return [
        Launch(_peaks_kernel, (batch * num_beams, num_parts), shared),
        # one warp for as long as it can: it waits for no other
        Launch(_choose_kernel, (batch,), {**shared, **choose}, num_warps=1 if widest <= 1024 else widest // 256),
    ]


def _check(logits: torch.Tensor, scores: torch.Tensor, num_kept: int, noise: torch.Tensor | None, scale: float) -> None:
    batch, num_beams, head_size = logits.shape
    if not (1 <= num_kept <= MAX_KEPT and 1 <= num_beams <= MAX_BEAMS):
        raise ValueError(
            f"num_kept is {num_kept} for {num_beams} beams, but the kernel keeps 1 to {MAX_KEPT} continuations of 1 to "
            f"{MAX_BEAMS} beams: change what is out of range"
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, but the order of logits must survive it: pass a positive number")
    if scores.shape != (batch, num_beams) or (noise is not None and noise.shape != (batch, head_size)):
        raise ValueError(
            f"scores {tuple(scores.shape)} or noise {None if noise is None else tuple(noise.shape)} do not fit logits "
            f"of {tuple(logits.shape)}: pass [batch, beams] and [batch, head_size]"
        )
    if any(tensor is not None and tensor.stride(-1) != 1 for tensor in (logits, noise)):
        raise ValueError("logits or noise are not contiguous in their last dimension: pass rows that are")


@triton.jit
def _peaks_kernel(
    logits,
    noise,
    group_peaks,
    part_peaks,
    part_sums,
    scale,
    logits_stride_request,
    logits_stride_beam,
    noise_stride,
    head_size,
    num_groups,
    num_parts,
    NUM_BEAMS: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    request = row // NUM_BEAMS
    part = tl.program_id(1)
    group = part * (PART // GROUP) + tl.arange(0, PART // GROUP)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = _values(
        logits + request * logits_stride_request + (row % NUM_BEAMS) * logits_stride_beam,
        noise,
        request * noise_stride,
        token,
        token < head_size,
    )
    peaks = tl.max(values, axis=1)
    tl.store(group_peaks + row * num_groups + group, peaks, mask=group < num_groups)
    peak = tl.max(peaks, axis=0)
    # a part without finite logits has no peak to subtract
    base = tl.where(peak > float("-inf"), peak, 0.0)
    weights = tl.exp((values - base) * scale)
    tl.store(part_peaks + row * num_parts + part, peak)
    tl.store(part_sums + row * num_parts + part, tl.sum(tl.sum(weights, axis=1), axis=0))


@triton.jit
def _choose_kernel(
    logits,
    noise,
    group_peaks,
    part_peaks,
    part_sums,
    scores,
    out_beams,
    out_draft_ids,
    out_log_probs,
    scale,
    logits_stride_request,
    logits_stride_beam,
    noise_stride,
    scores_stride_request,
    scores_stride_beam,
    head_size,
    num_groups,
    num_parts,
    NUM_BEAMS: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
    KEPT: tl.constexpr,
    PADDED_KEPT: tl.constexpr,
    PADDED_BEAMS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    beam = tl.arange(0, PADDED_BEAMS)
    part = tl.arange(0, PADDED_PARTS)
    in_beams = beam < NUM_BEAMS
    in_parts = in_beams[:, None] & (part < num_parts)[None, :]
    parts = (request * NUM_BEAMS + beam)[:, None] * num_parts + part[None, :]
    highest = tl.load(part_peaks + parts, mask=in_parts, other=float("-inf"))
    sums = tl.load(part_sums + parts, mask=in_parts, other=0.0)
    score = tl.load(
        scores + request * scores_stride_request + beam * scores_stride_beam, mask=in_beams, other=float("-inf")
    )
    peak = tl.max(highest, axis=1)
    peak = tl.where(peak > float("-inf"), peak, 0.0)
    total = tl.sum(sums * tl.exp((highest - peak[:, None]) * scale), axis=1)
    at_peak = score - tl.log(tl.where(total > 0, total, 1.0))

    place = beam[:, None] * num_parts + part[None, :]
    keys = _keys(highest, peak[:, None], at_peak[:, None], scale)
    key, place = _first(keys, place, in_parts, KEPT, PADDED_KEPT)

    exists = key > _NONE
    beam_of = tl.where(exists, place // num_parts, 0)
    group = (place % num_parts * (PART // GROUP))[:, None] + tl.arange(0, PART // GROUP)[None, :]
    in_part = exists[:, None] & (group < num_groups)
    row = request * NUM_BEAMS + beam_of
    highest = tl.load(group_peaks + row[:, None] * num_groups + group, mask=in_part, other=float("-inf"))
    keys = _keys(highest, tl.gather(peak, beam_of, 0)[:, None], tl.gather(at_peak, beam_of, 0)[:, None], scale)
    key, place = _first(keys, beam_of[:, None] * num_groups + group, in_part, KEPT, PADDED_KEPT)

    exists = key > _NONE
    beam_of = tl.where(exists, place // num_groups, 0)
    token = (place % num_groups * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    in_group = exists[:, None] & (token < head_size)
    rows = logits + request * logits_stride_request + beam_of.to(tl.int64)[:, None] * logits_stride_beam
    values = _values(rows, noise, request * noise_stride, token, in_group)
    keys = _keys(values, tl.gather(peak, beam_of, 0)[:, None], tl.gather(at_peak, beam_of, 0)[:, None], scale)
    key, place = _first(keys, beam_of[:, None] * head_size + token, in_group, KEPT, PADDED_KEPT)

    rank = tl.arange(0, PADDED_KEPT)
    out = request * KEPT + rank
    tl.store(out_beams + out, (place // head_size).to(tl.int64), mask=rank < KEPT)
    tl.store(out_draft_ids + out, (place % head_size).to(tl.int64), mask=rank < KEPT)
    tl.store(out_log_probs + out, _ordered(key).to(tl.float32, bitcast=True), mask=rank < KEPT)


@triton.jit
def _values(rows, noise, noise_row, token, in_head):
    """Return logits and their noise, summed in fp32; -inf outside the head."""
    values = tl.load(rows + token, mask=in_head, other=float("-inf")).to(tl.float32)
    if noise is not None:
        values += tl.load(noise + noise_row + token, mask=in_head, other=0.0)
    return values


@triton.jit
def _keys(values, peak, at_peak, scale):
    """Return integers in the order of the totals of `values`."""
    # one rounding, the same at every level
    totals = tl.fma(values - peak, tl.full(values.shape, scale, tl.float32), tl.broadcast_to(at_peak, values.shape))
    return _ordered(totals.to(tl.int32, bitcast=True))


@triton.jit
def _ordered(bits):
    """Return integers that compare as the fp32 numbers with these bits do; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _first(keys, places, exist, KEPT: tl.constexpr, PADDED_KEPT: tl.constexpr):
    """Return the highest keys and their places, [PADDED_KEPT] each, highest first; `_NONE` where there are no more."""
    keys = tl.where(exist, keys, _NONE)
    rank = tl.arange(0, PADDED_KEPT)
    first_keys = tl.full([PADDED_KEPT], _NONE, dtype=tl.int32)
    first_places = tl.full([PADDED_KEPT], 0, dtype=tl.int32)
    for index in range(KEPT):
        key = tl.max(keys)
        place = tl.min(tl.where(keys == key, places, _NOWHERE))
        first_keys = tl.where(rank == index, key, first_keys)
        first_places = tl.where(rank == index, place, first_places)
        keys = tl.where(places == place, _NONE, keys)
    return first_keys, first_places
