"""What memory there is left, for decisions that are made before it is taken."""

from __future__ import annotations

import contextlib
from pathlib import Path

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def available_bytes() -> int:
    """Return what the machine has left, or a container's limit where that is less."""
    # comes with vLLM; here, so that commands can be asked for help without it
    import psutil

    available: int = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # there is no limit
        available = min(available, int(_CONTAINER_LIMIT.read_text(encoding="ascii")))
    return available
