"""What a kernel did in one case, and how near to its twin it must come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Of the largest output: what goes into the second product is rounded to 24, 11 or 8 bits."""
VOCAB_SIZE = 128_000


class Measurement(NamedTuple):
    """A kernel in one case."""

    kernel: str
    case: str
    error: float
    """Largest difference from the twin in fp32 over the largest output; for tokens and rows, the share that differs."""
    tolerance: float
    ms: float | None = None
    floor_ms: float | None = None
    stock_ms: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether the kernel computes what its twin does; a nan does not."""
        return self.error <= self.tolerance


def share_that_differs(ours: Iterable[torch.Tensor], twins: Iterable[torch.Tensor]) -> float:
    """Return how much of the worst of several outputs is not the twin's."""
    return max(float((a != b).float().mean()) for a, b in zip(ours, twins, strict=True))


def call(function: Callable[..., object], *arguments: object, **options: object) -> Callable[[], object]:
    """Return a call of a function, as it can be timed."""
    return lambda: function(*arguments, **options)
