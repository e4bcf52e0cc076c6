"""Where the KV caches of several layers lie, so that one launch reaches all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

_WORD_BYTES = 8


class LayerCaches(NamedTuple):
    """Caches of one shape: keys and values of every layer, or both side by side in the last dimension."""

    tensors: tuple[torch.Tensor, ...]  # each [num_blocks, block_size, num_kv_heads, size]
    addresses: torch.Tensor  # [num_caches] int64, on the caches' device
    word_bytes: int
    """What all addresses, strides and rows are multiples of: 8, 4, 2 or 1."""


def layer_caches(tensors: Sequence[torch.Tensor]) -> LayerCaches:
    """Return the caches as kernels find them; valid for as long as the tensors' storage stays where it is.

    Raises:
        ValueError: there are none, or they differ in shape, strides, type or device.
    """
    kinds = {(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) != 1 or tensors[0].stride(-1) != 1:
        raise ValueError(
            f"{len(tensors)} caches of {len(kinds)} kinds were given, or a head is not contiguous: pass the caches of "
            "one group of layers, all of one shape, stride, type and device"
        )
    first = tensors[0]
    addresses = [tensor.data_ptr() for tensor in tensors]
    row_bytes = [first.element_size() * stride for stride in (*first.stride()[:-1], first.shape[-1])]
    word_bytes = math.gcd(_WORD_BYTES, *addresses, *row_bytes)
    return LayerCaches(tuple(tensors), torch.tensor(addresses, device=first.device), word_bytes)
