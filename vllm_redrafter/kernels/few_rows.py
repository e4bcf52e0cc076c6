"""`linear` in fp32 on a CPU for the few rows of a verified tree; its twin is torch's own.

Libraries for products of matrices take a row more to be work; where memory is what limits, up to a dozen rows take
the time of one (`few_rows.cpp`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from vllm_redrafter.kernels import cpu_library


class PackedMatrix:
    """A weight in the layout that `linear` reads.

    Args:
        weight: [outputs, inputs] fp32, on the CPU; it is copied.

    Attributes:
        panels: the copy, [panels, inputs, width].

    Raises:
        NotCompiledError: there is no C++ compiler, or it fails.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        width = int(_library().panel_width())
        self.num_outputs, self.num_inputs = weight.shape
        padded = functional.pad(weight.detach(), (0, 0, 0, -self.num_outputs % width))
        self.panels = padded.view(-1, width, self.num_inputs).transpose(1, 2).contiguous()

    @property
    def num_bytes(self) -> int:
        """What the packed copy takes."""
        return self.panels.nbytes

    def linear(
        self,
        x: torch.Tensor,  # [rows, inputs] fp32
        bias: torch.Tensor | None,  # [outputs] fp32
        out: torch.Tensor,  # [rows, outputs] fp32, contiguous
    ) -> None:
        """Write `x @ weight.T + bias`; a row's result does not depend on the other rows."""
        linear(x, self.panels, bias, out)


def linear(
    x: torch.Tensor,  # [rows, inputs] fp32
    panels: torch.Tensor,  # of a `PackedMatrix`
    bias: torch.Tensor | None,  # [outputs] fp32
    out: torch.Tensor,  # [rows, outputs] fp32, contiguous
) -> None:
    """Do what `PackedMatrix.linear` does, for those who keep its panels themselves."""
    x = x.contiguous()
    rows, inputs = x.shape
    _linear()(
        x.data_ptr(),
        panels.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        inputs,
        out.shape[1],
    )


@functools.cache
def _linear() -> Callable[..., None]:
    # looked up once: an attribute of a library takes longer than what a small product computes
    function: Callable[..., None] = _library().linear
    return function


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu_library.load("few_rows")
    library.linear.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3]
    library.linear.restype = None
    return library
