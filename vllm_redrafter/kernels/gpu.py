"""What a launcher asks of the GPU before it divides the work."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """A kind of GPU."""

    capability: int = 90
    """Compute capability: 80 for 8.0."""
    num_multiprocessors: int = 132


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Return the kind of a device; what is no GPU counts as an H100, which it is interpreted or compiled for."""
    if device.type != "cuda":
        return Gpu()
    properties = torch.cuda.get_device_properties(device)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count)
