"""Tree attention in fp32 on a CPU, over the cache that vLLM's vector kernels read (`cpu_tree_attention.cpp`).

vLLM's own kernel is causal: a tree takes it one call for every leaf.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from vllm_redrafter.kernels import cpu_library
from vllm_redrafter.kernels.batch import AttentionOptions, TreeBatch

_LEAST_SHARE = 512
"""Positions of a context: fewer are not divided among threads."""


def tree_attention(
    query: torch.Tensor,  # [num_rows, num_heads, head_size] fp32
    key_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_size] fp32
    value_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_size] fp32
    trees: TreeBatch,
    options: AttentionOptions,
    out: torch.Tensor,  # [num_rows, num_heads, head_size] fp32, contiguous
) -> None:
    """Write the attention of every tree row to `out`: the CPU's kernel for `reference.tree_attention`.

    Rows whose word is 0 are padding within a request and become 0; rows that belong to no request stay untouched, and
    so do those of a request that has more of them than words.

    Raises:
        ValueError: shapes, types or strides do not fit each other.
        NotCompiledError: there is no C++ compiler, or it fails.
    """
    TreeAttention(trees).run(query, LayerCache(key_cache, value_cache, options), out)


class LayerCache:
    """A layer's cache as the kernel reads it, looked at once instead of in every step.

    Args:
        key_cache: [num_blocks, block_size, num_kv_heads, head_size] fp32; the positions of a block are contiguous.
        value_cache: likewise; the rows of a head are contiguous within a block.

    Raises:
        ValueError: shapes, types or strides do not fit each other.
        NotCompiledError: there is no C++ compiler, or it fails.
    """

    def __init__(self, key_cache: torch.Tensor, value_cache: torch.Tensor, options: AttentionOptions) -> None:
        _, self.block_size, self.num_kv_heads, self.head_size = key_cache.shape
        if key_cache.dtype != torch.float32 or value_cache.dtype != torch.float32:
            raise ValueError(f"keys are {key_cache.dtype} and values {value_cache.dtype}: pass fp32")
        if not supports(self.head_size, self.block_size):
            raise ValueError(
                f"heads of {self.head_size} and blocks of {self.block_size} are not made of whole panels, as "
                "`supports` would tell"
            )
        self.block_stride, _, self.kv_head_stride, _ = key_cache.stride()
        of_keys = self.block_stride, 1, self.kv_head_stride, self.block_size
        of_values = self.block_stride, self.head_size, self.kv_head_stride, 1
        if not (_has_strides(key_cache, of_keys) and _has_strides(value_cache, of_values)):
            raise ValueError(
                f"strides are {key_cache.stride()} of keys and {value_cache.stride()} of values: pass keys with "
                "contiguous positions, and values with contiguous heads"
            )
        self.tensors = key_cache, value_cache
        self.pointers = key_cache.data_ptr(), value_cache.data_ptr()
        self.options = options


class TreeAttention:
    """The attention of one step's trees, in any number of layers.

    Raises:
        ValueError: what `trees` says does not fit together.
        NotCompiledError: there is no C++ compiler, or it fails.
    """

    def __init__(self, trees: TreeBatch) -> None:
        trees.check()
        columns = trees.block_table, trees.query_start_loc, trees.seq_lens, trees.ancestors
        if any(column.dtype != torch.int32 for column in columns[:3]):
            raise ValueError(
                f"block_table, query_start_loc and seq_lens are {[str(column.dtype) for column in columns[:3]]}: pass "
                "int32"
            )
        self._columns = [column.contiguous() for column in columns]
        self._num_requests, max_rows = trees.ancestors.shape
        self._max_seq_len = trees.max_seq_len
        self._num_rows = int(trees.query_start_loc[-1])
        self._call = _Call()
        for name, column in zip(_COLUMNS, self._columns, strict=True):
            setattr(self._call, name, column.data_ptr())
        self._call.num_requests, self._call.max_rows = self._num_requests, max_rows
        self._call.max_blocks = trees.block_table.shape[1]
        self._address = ctypes.byref(self._call)
        self._run = _library().tree_attention

    def run(self, query: torch.Tensor, layer: LayerCache, out: torch.Tensor) -> None:
        """Do what `tree_attention` says.

        Raises:
            ValueError: queries or outputs do not fit the trees and the layer.
        """
        call, options = self._call, layer.options
        num_rows, num_heads, head_size = query.shape
        if (
            query.dtype != torch.float32
            or out.dtype != torch.float32
            or out.shape != query.shape
            or num_rows < self._num_rows
            or head_size != layer.head_size
            or num_heads % layer.num_kv_heads
            or query.stride(2) != 1
            or not out.is_contiguous()
        ):
            raise ValueError(
                f"queries are {tuple(query.shape)} {query.dtype} of strides {query.stride()}, outputs "
                f"{tuple(out.shape)} {out.dtype} of strides {out.stride()}: pass [at least {self._num_rows}, a "
                f"multiple of {layer.num_kv_heads}, {layer.head_size}] fp32 with contiguous heads twice, the outputs "
                "contiguous"
            )
        call.query, call.out = query.data_ptr(), out.data_ptr()
        call.keys, call.values = layer.pointers
        call.num_heads, call.num_kv_heads = num_heads, layer.num_kv_heads
        call.head_size, call.block_size = head_size, layer.block_size
        call.query_row_stride, call.query_head_stride, _ = query.stride()
        call.block_stride, call.kv_head_stride = layer.block_stride, layer.kv_head_stride
        call.sliding_window, call.scale, call.soft_cap = options.sliding_window, options.scale, options.soft_cap
        call.num_splits = _num_splits(self._num_requests * layer.num_kv_heads, self._max_seq_len)
        self._run(self._address)


def supports(head_size: int, block_size: int) -> bool:
    """Return whether heads and blocks are made of whole panels.

    Raises:
        NotCompiledError: there is no C++ compiler, or it fails.
    """
    width = panel_width()
    return head_size % width == 0 and block_size % width == 0


def panel_width() -> int:
    """Return the columns of a panel on this processor.

    Raises:
        NotCompiledError: there is no C++ compiler, or it fails.
    """
    return int(_library().panel_width())


_COLUMNS = ("block_table", "query_start_loc", "seq_lens", "ancestors")


class _Call(ctypes.Structure):
    """`Call` in C++."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "out", *_COLUMNS)),
        *((name, ctypes.c_int64) for name in ("num_requests", "max_blocks", "max_rows")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_size", "block_size")),
        *((name, ctypes.c_int64) for name in ("query_row_stride", "query_head_stride")),
        *((name, ctypes.c_int64) for name in ("block_stride", "kv_head_stride")),
        *((name, ctypes.c_int64) for name in ("sliding_window", "num_splits")),
        *((name, ctypes.c_float) for name in ("scale", "soft_cap")),
    )


def _num_splits(num_pairs: int, max_seq_len: int) -> int:
    """Return into how many shares a context is divided, so that every thread has one."""
    return max(1, min(-(-torch.get_num_threads() // max(num_pairs, 1)), max_seq_len // _LEAST_SHARE))


def _has_strides(tensor: torch.Tensor, strides: tuple[int, ...]) -> bool:
    """Return whether elements lie so; a dimension of one element has any stride."""
    return all(
        size == 1 or stride == expected
        for size, stride, expected in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu_library.load("cpu_tree_attention")
    library.tree_attention.argtypes = [ctypes.POINTER(_Call)]
    library.tree_attention.restype = None
    return library
