"""The target's matrices for the few rows that a step verifies: packed once more, for products that read them once.

vLLM multiplies fp32 with oneDNN, which takes longer for five rows than for one even where reading the weights is all
the work there is. Up to how many rows the packed copies are quicker is measured at start; the rest stays vLLM's. This
goes when vLLM's own products of few rows take the time of one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from vllm import _custom_ops
from vllm.logger import init_logger

from vllm_redrafter.adapter.timing import median_seconds
from vllm_redrafter.kernels.few_rows import PackedMatrix

logger = init_logger(f"vllm.{__name__}")

_LEAST_BYTES = 1 << 26
"""A smaller target stays in the caches, where rows cost what they compute."""

_ROWS = (4, 8, 16, 32, 64)
_TIMED_BYTES = 1 << 29
"""So many weights are enough to time: no cache holds them."""


class TargetMatrices:
    """The packed matrices of one target.

    Args:
        wanted: None to have them where they are quicker: in a target that caches do not hold, for as many rows as that.

    Attributes:
        most_rows: up to so many rows are multiplied by them.
    """

    def __init__(self, wanted: bool | None = None) -> None:
        self.most_rows = _ROWS[-1] if wanted else 0
        self._wanted = wanted
        self._entries: list[_Entry] = []

    @contextlib.contextmanager
    def packed(self) -> Iterator[None]:
        """Pack what vLLM hands to oneDNN meanwhile, if it is fp32 and wanted; vLLM keeps oneDNN's own copies alone."""
        if self._wanted is False:
            yield
            return
        stock = _custom_ops.create_onednn_mm
        handed: list[tuple[Any, torch.Tensor]] = []

        @functools.wraps(stock)
        def create(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # [inputs, outputs]
            handler = stock(weight, *args, **kwargs)
            if weight.dtype == torch.float32:
                handed.append((handler, weight.t()))
            return handler

        # layers call what they find in this module, and offer no hook
        _custom_ops.create_onednn_mm = create
        try:
            yield
        finally:
            _custom_ops.create_onednn_mm = stock
        if self._wanted or sum(weight.nbytes for _, weight in handed) >= _LEAST_BYTES:
            self._pack(handed)

    def _pack(self, handed: list[tuple[Any, torch.Tensor]]) -> None:
        if not handed:
            logger.warning("pack_target changes nothing: the target has no fp32 matrices that oneDNN multiplies")
            return
        _serve_packed()
        # one by one, so that the original of a matrix goes when its copy is made
        while handed:
            handler, weight = handed.pop()
            try:
                entry = _Entry(self, PackedMatrix(weight), handler.handler_tensor)
            except RuntimeError as error:  # there is no compiler, or it fails
                reason = str(error).partition("\n")[0]
                logger.warning("The target's matrices are not packed, so that rows cost more: %s", reason)
                return
            pointer = handler.handler_tensor.item()
            _served[pointer] = entry
            self._entries.append(entry)
            # the next handler may get its address
            weakref.finalize(handler, _served.pop, pointer, None)

    @torch.inference_mode()
    def tune(self) -> None:
        """Find out up to how many rows the packed matrices are quicker, and forget them if they never are."""
        if not self._entries or self._wanted is not None:
            return
        quicker = 0
        for num_rows in _ROWS:
            packed, stock = (self._seconds(num_rows, most_rows) for most_rows in (num_rows, 0))
            if packed >= stock:
                break
            quicker = num_rows
        self.most_rows = quicker
        if not quicker:
            for entry in self._entries:
                del _served[int(entry.handler_tensor.item())]
            self._entries = []
        gib = sum(entry.matrix.num_bytes for entry in self._entries) / (1 << 30)
        logger.info("Products of up to %d rows read packed copies of the target's matrices (%.2f GiB)", quicker, gib)

    def _seconds(self, num_rows: int, most_rows: int) -> float:
        """Return the time of the products of so many rows with all matrices, or as many as it takes to know."""
        self.most_rows = most_rows
        bytes_before = itertools.accumulate((entry.matrix.num_bytes for entry in self._entries), initial=0)
        products = [
            (
                torch.empty(num_rows, entry.matrix.num_outputs),
                torch.ones(num_rows, entry.matrix.num_inputs),
                None,
                entry.handler_tensor,
            )
            for entry, num_bytes in zip(self._entries, bytes_before, strict=False)
            if num_bytes < _TIMED_BYTES
        ]

        def multiply() -> None:
            for product in products:
                torch.ops._C.onednn_mm(*product)

        return median_seconds(multiply)


class _Entry(NamedTuple):
    """A packed matrix, and the address of oneDNN's copy, which vLLM's operator is called with."""

    owner: TargetMatrices
    matrix: PackedMatrix
    handler_tensor: torch.Tensor


_served: dict[int, _Entry] = {}
"""By the address of oneDNN's copy."""


@functools.cache
def _serve_packed() -> torch.library.Library:
    """Let vLLM's operator multiply few rows by the packed matrix where there is one; what it returns must live on.

    Behind the operator and not in the layers, so that what vLLM has compiled with it is the same with and without.
    """
    stock = torch.library.get_kernel("_C::onednn_mm", "CPU")

    def onednn_mm(
        keys: Any, out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, handler_tensor: torch.Tensor
    ) -> None:  # out: [rows, outputs], x: [rows, inputs]
        entry = _served.get(int(handler_tensor.item()))
        if entry is not None and len(x) <= entry.owner.most_rows:
            entry.matrix.linear(x, bias, out)
        else:
            stock.call_boxed(keys, out, x, bias, handler_tensor)

    library = torch.library.Library("_C", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("onednn_mm", onednn_mm, "CPU", with_keyset=True)  # type: ignore[no-untyped-call]
    return library
