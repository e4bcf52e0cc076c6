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
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import _custom_ops
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_redrafter.adapter.memory import available_bytes
from vllm_redrafter.adapter.timing import least_seconds
from vllm_redrafter.kernels.cpu_library import NotCompiledError
from vllm_redrafter.kernels.few_rows import PackedMatrix

logger = init_logger(f"vllm.{__name__}")

_LEAST_BYTES = 1 << 26
"""A smaller target stays in the caches, where rows cost what they compute."""

_LARGEST_SHARE = 1 / 4
"""Of free memory that packed copies take unasked; most of it is for the KV cache."""

_ROWS = (4, 8, 16, 32, 64)
_TIMED_BYTES = 1 << 27
"""So many weights are enough to time: hardly a cache holds them."""


class TargetMatrices:
    """The packed matrices of one target.

    Args:
        wanted: None to have them where they are quicker: in a target that caches do not hold, if there is memory for
            them, and for as many rows as that.
        reserved_bytes: what the KV cache is to have, if that is known.
        num_processes: how many hold a part of the target each, on this machine.

    Attributes:
        most_rows: up to so many rows are multiplied by them.
    """

    def __init__(self, wanted: bool | None = None, reserved_bytes: int = 0, num_processes: int = 1) -> None:
        self.most_rows = _ROWS[-1] if wanted else 0
        self._wanted = wanted
        self._reserved_bytes = reserved_bytes
        self._num_processes = num_processes
        self._entries: list[_Entry] = []

    @contextlib.contextmanager
    def packed(self) -> Iterator[None]:
        """Pack what vLLM hands to oneDNN meanwhile, if it is fp32 and wanted; vLLM keeps oneDNN's own copies alone."""
        if self._wanted is False:
            yield
            return
        stock = _custom_ops.create_onednn_mm
        packing = _Packing(self, self._least_bytes(), self._most_bytes())

        @functools.wraps(stock)
        def create(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # [inputs, outputs]
            handler = stock(weight, *args, **kwargs)
            if weight.dtype == torch.float32:
                packing.add(handler, weight.t())
            return handler

        # layers call what they find in this module, and offer no hook
        _custom_ops.create_onednn_mm = create
        try:
            yield
        finally:
            _custom_ops.create_onednn_mm = stock
        self._entries = packing.entries
        if self._wanted and not packing.num_bytes:
            logger.warning("pack_target changes nothing: the target has no fp32 matrices that oneDNN multiplies")

    @torch.inference_mode()
    def forget_embeddings(self, model: Any, hidden: torch.Tensor) -> None:
        """Leave alone what is never multiplied: vLLM hands every embedding to oneDNN, since it could be the head.

        Args:
            model: the target, whose head is asked once.
            hidden: [1, hidden_size], anything that it takes.
        """
        if not self._entries:
            return
        modules = (module for module in model.modules() if isinstance(module, VocabParallelEmbedding))
        embeddings = {module.weight.data_ptr() for module in modules}
        with _Multiplied() as multiplied:
            model.compute_logits(hidden)

        def is_idle(entry: _Entry) -> bool:
            return entry.weight_pointer in embeddings and entry.pointer not in multiplied.pointers

        _forget([entry for entry in self._entries if is_idle(entry)])
        self._entries = [entry for entry in self._entries if not is_idle(entry)]

    def _least_bytes(self) -> int:
        return 0 if self._wanted else _LEAST_BYTES

    def _most_bytes(self) -> float:
        if self._wanted:
            return float("inf")
        return (available_bytes() - self._reserved_bytes) * _LARGEST_SHARE / self._num_processes

    @torch.inference_mode()
    def tune(self) -> None:
        """Find out up to how many rows the packed matrices are quicker, and forget them if they never are."""
        if not self._entries or self._wanted is not None:
            return
        quicker = 0
        for num_rows in _ROWS:
            packed, stock = self._seconds(num_rows)
            if packed >= stock:
                break
            quicker = num_rows
        self.most_rows = quicker
        if not quicker:
            _forget(self._entries)
        gib = sum(entry.matrix.num_bytes for entry in self._entries) / (1 << 30)
        logger.info("Products of up to %d rows read packed copies of the target's matrices (%.2f GiB)", quicker, gib)

    def _seconds(self, num_rows: int) -> list[float]:
        """Return the times of so many rows' products with packed matrices and with vLLM's.

        All matrices are multiplied, or as many as it takes to know.
        """
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

        def multiply(most_rows: int) -> None:
            self.most_rows = most_rows
            for product in products:
                torch.ops._C.onednn_mm(*product)

        return least_seconds(lambda: multiply(num_rows), lambda: multiply(0))


class _Packing:
    """The matrices of a target that loads: they wait until it is large enough, and go if it is too large."""

    def __init__(self, owner: TargetMatrices, least_bytes: int, most_bytes: float) -> None:
        self.entries: list[_Entry] = []
        self.num_bytes = 0
        self._given_up = False
        self._owner = owner
        self._least_bytes = least_bytes
        self._most_bytes = most_bytes
        self._waiting: list[tuple[Any, torch.Tensor]] = []

    def add(self, handler: Any, weight: torch.Tensor) -> None:  # [outputs, inputs]
        self.num_bytes += weight.nbytes
        if self._given_up:
            return
        if self.num_bytes > self._most_bytes:
            self._give_up("they would take more than a quarter of the memory that is free")
            return
        self._waiting.append((handler, weight))
        if self.num_bytes < self._least_bytes:
            return
        # at once, and those that waited one by one: so that an original goes when its copy is made
        while self._waiting:
            handler, weight = self._waiting.pop()
            try:
                self._pack(handler, weight)
            except NotCompiledError as error:
                self._give_up(str(error))

    def _pack(self, handler: Any, weight: torch.Tensor) -> None:
        _serve_packed()
        entry = _Entry(self._owner, PackedMatrix(weight), handler.handler_tensor, weight.data_ptr())
        _served[entry.pointer] = entry
        self.entries.append(entry)
        # the next handler may get its address
        weakref.finalize(handler, _served.pop, entry.pointer, None)

    def _give_up(self, reason: str) -> None:
        logger.warning("The target's matrices are not packed, so that rows cost more: %s", reason)
        self._given_up = True
        self._waiting.clear()
        _forget(self.entries)


class _Entry(NamedTuple):
    """A packed matrix, and the address of oneDNN's copy, which vLLM's operator is called with."""

    owner: TargetMatrices
    matrix: PackedMatrix
    handler_tensor: torch.Tensor
    weight_pointer: int
    """Where the original was, or is if something else needs it."""

    @property
    def pointer(self) -> int:
        """The address itself."""
        return int(self.handler_tensor.item())


class _Multiplied(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which matrices of oneDNN are multiplied meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pointers: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._C.onednn_mm.default:
            self.pointers.add(int(args[-1].item()))
        return func(*args, **(kwargs or {}))


_served: dict[int, _Entry] = {}
"""By the address of oneDNN's copy."""


def _forget(entries: list[_Entry]) -> None:
    """Leave the products of these to vLLM, and their memory to others."""
    for entry in entries:
        _served.pop(entry.pointer, None)
    entries.clear()


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
