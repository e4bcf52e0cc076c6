"""What Triton's interpreter gets wrong, put right for the tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def multiply_bf16() -> None:
    """Let `tl.dot` multiply bfloat16: NumPy has no such type, and the interpreter multiplies the integers behind it."""
    stock = InterpreterBuilder.create_dot
    if stock.__name__ != "create_dot":
        return

    def create_dot_of_values(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return stock(self, _as_float32(a), _as_float32(b), *arguments)

    InterpreterBuilder.create_dot = create_dot_of_values


def _as_float32(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    # the upper half of a float32's bits
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
