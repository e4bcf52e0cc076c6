"""What a launch compiles to for a GPU that need not be there: registers, shared memory, spills, loads.

Triton's compiler brings its own assembler, so all that a GPU is needed for is running. A launch is compiled exactly as
it would be on the GPU, with the specialisation that its arguments call for. Only in a process in which Triton was
imported without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vllm_redrafter.kernels.launch import Launch

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")
_WAIT = re.compile(r"async_wait[^{\n]*\{num = (\d+)")


class Binary(NamedTuple):
    """What a kernel needs of a GPU."""

    registers: int
    """Per thread."""
    shared_bytes: int
    """Per program."""
    spilled_bytes: int
    """Per thread: what did not fit into registers."""
    loads_ahead: int | None
    """Groups of loads that stay under way where a loop waits for earlier ones; None where no loop waits for any."""


class _AbsentGpu:
    """Stands in for Triton's driver where a kernel is compiled and not run."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device
        return int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(launch: Launch, capability: int) -> Binary:
    """Return what the launch's kernel needs on GPUs of a compute capability: 80, 90, 100, ...

    Raises:
        ValueError: Triton was imported to interpret kernels.
    """
    if not isinstance(launch.kernel, JITFunction):
        raise ValueError("TRITON_INTERPRET was set when the kernels were imported: unset it to compile them")
    with _pretended(capability):
        compiled = launch.kernel.warmup(
            grid=launch.grid, num_warps=launch.num_warps, num_stages=launch.num_stages, **launch.arguments
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = _USAGE.search(listing)
    assert usage is not None, listing
    registers, stack, local = map(int, usage.groups())
    return Binary(registers, compiled.metadata.shared, stack + local, _loads_ahead(compiled.asm["ttgir"]))


def _loads_ahead(code: str) -> int | None:
    """Return how many groups of loads the least patient wait of a loop leaves under way, by Triton's GPU code."""
    loops = [behind.split("scf.yield")[0] for behind in code.split("scf.for")[1:]]
    return min((int(count) for loop in loops for count in _WAIT.findall(loop)), default=None)


@contextmanager
def _pretended(capability: int) -> Iterator[None]:
    """Let Triton believe in a GPU."""
    config = triton.runtime.driver
    # not `active`: asking for it looks for a driver, and fails where there is none
    before = config._active
    config.set_active(_AbsentGpu(capability))
    try:
        yield
    finally:
        config._active = before
