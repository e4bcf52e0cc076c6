"""Where a training's memory comes from on a CPU: the C library, which is told to keep what tensors leave.

A step makes and drops tensors of many MiB. glibc gives such blocks back to the kernel at once and asks for them anew,
page by page: on two cores that was a fifth of a step.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
_LARGEST_BLOCK = 32 * 2**20
"""As large as glibc lets a block be that it keeps."""
_MOST_KEPT = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process reuse freed blocks of up to 32 MiB; elsewhere than on glibc, nothing changes."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
    libc.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
