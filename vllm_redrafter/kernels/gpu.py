"""What a launcher asks of the GPU before it divides the work."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

_SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
"""Shared memory that a program can have, by compute capability (CUDA programming guide); on all others 99 KiB."""


class Gpu(NamedTuple):
    """A kind of GPU."""

    capability: int = 90
    """Compute capability: 80 for 8.0."""
    num_multiprocessors: int = 132

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a program can have."""
        return 1024 * _SHARED_KIB.get(self.capability, 99)

    @property
    def has_large_products(self) -> bool:
        """Whether matrix products read their operands from shared memory: Hopper and the large Blackwells."""
        return 90 <= self.capability < 120


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Return the kind of a device; what is no GPU counts as an H100, which it is interpreted or compiled for."""
    if device.type != "cuda":
        return Gpu()
    properties = torch.cuda.get_device_properties(device)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count)
