"""Whether several engines can be up at the same time."""

from __future__ import annotations

from pathlib import Path

_BYTES_PER_ENGINE = 2 * 2**30
"""An engine without its weights: KV cache 1 GiB, libraries and buffers half of that, room."""


def engines_fit(target: str, num_engines: int) -> bool:
    """Return whether so many engines of a target, a directory or a Hub id, are likely to fit into free memory."""
    weights = sum(file.stat().st_size for file in Path(target).glob("*.safetensors"))
    # 16-bit weights may be held in 32
    return num_engines * (_BYTES_PER_ENGINE + 2 * weights) <= _available_bytes()


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
