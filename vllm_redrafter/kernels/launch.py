"""A kernel launch as a value: what a launcher would run can be run, looked at, or compiled for another GPU."""

from __future__ import annotations

from typing import Any, NamedTuple


class Launch(NamedTuple):
    """One launch of a Triton kernel."""

    kernel: Any
    """The function under `triton.jit`."""
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By name: tensors, numbers and compile-time constants."""
    num_warps: int = 4
    num_stages: int = 1

    def run(self) -> None:
        """Run the kernel on its arguments' device; a grid without programs runs nothing."""
        if 0 not in self.grid:
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)
