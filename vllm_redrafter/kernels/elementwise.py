"""What lies between a drafter's matrix products: sums and SiLU in one launch, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_redrafter.kernels.launch import Launch

_BLOCK = 1024


def silu_of_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:  # both of one shape
    """Return `SiLU(a + b)`.

    Raises:
        ValueError: they differ in shape, or are not contiguous.
    """
    return _run(plan(a, b, sums_first=True))


def plus_silu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # both of one shape
    """Return `x + SiLU(y)`.

    Raises:
        ValueError: they differ in shape, or are not contiguous.
    """
    return _run(plan(x, y, sums_first=False))


def plan(x: torch.Tensor, y: torch.Tensor, *, sums_first: bool) -> Launch:
    """Return the launch of `silu_of_sum`, or else of `plus_silu`."""
    if x.shape != y.shape or not (x.is_contiguous() and y.is_contiguous()):
        raise ValueError(
            f"tensors are of {tuple(x.shape)} and {tuple(y.shape)}, or not contiguous: pass two of one shape that are"
        )
    return Launch(
        _silu_kernel,
        (triton.cdiv(x.numel(), _BLOCK),),
        {"x": x, "y": y, "out": torch.empty_like(x), "size": x.numel(), "SUMS_FIRST": sums_first, "BLOCK": _BLOCK},
    )


def _run(launch: Launch) -> torch.Tensor:
    launch.run()
    out: torch.Tensor = launch.arguments["out"]
    return out


@triton.jit
def _silu_kernel(x, y, out, size, SUMS_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < size
    first = tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(y + place, mask=exists, other=0.0).to(tl.float32)
    if SUMS_FIRST:
        total = first + second
        result = total * tl.sigmoid(total)
    else:
        result = first + second * tl.sigmoid(second)
    tl.store(out + place, result, mask=exists)
