"""A training on a CPU keeps what its tensors leave."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_KEPT = """
from pathlib import Path
import torch
from vllm_redrafter.training.allocator import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

if {keep}:
    keep_freed_memory()
before = resident()
tensors = [torch.ones(6 * 2**20) for _ in range(4)]
most = resident()
del tensors
print((resident() - before) / (most - before))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back at once")
def test_freed_blocks_stay_with_the_process() -> None:
    def kept(keep: bool) -> float:
        program = _KEPT.format(keep=keep)
        return float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)

    assert kept(keep=False) < 0.1
    assert kept(keep=True) > 0.9
