"""What Triton's interpreter gets wrong or does again and again, put right for the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def multiply_bf16() -> None:
    """Let `tl.dot` multiply bfloat16: NumPy has no such type, and the interpreter multiplies the integers behind it."""
    stock = InterpreterBuilder.create_dot
    if stock.__name__ != "create_dot":
        return

    def create_dot_of_values(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return stock(self, _as_float32(a), _as_float32(b), *arguments)

    InterpreterBuilder.create_dot = create_dot_of_values


def patch_the_language_once() -> None:
    """Leave the functions of `triton.language` interpreted, once they are.

    The interpreter replaces all of them at every launch and in every call of a function that is not built in, `tl.max`
    among them, which takes longer than what they compute. A process that interprets compiles nothing.
    """
    stock = interpreter._patch_lang
    if stock.__name__ != "_patch_lang":
        return
    nothing_to_restore: dict[frozenset[int], Any] = {}  # by the modules of the language that a function sees

    def patch_once(function: Callable[..., Any]) -> Any:
        modules = frozenset(id(each) for each in function.__globals__.values() if each is tl or each is tl.core)
        if modules not in nothing_to_restore:
            nothing_to_restore[modules] = type(stock(function))()
        return nothing_to_restore[modules]

    interpreter._patch_lang = patch_once


def _as_float32(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    # the upper half of a float32's bits
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
