"""The C++ of the kernels for CPUs, compiled where it runs."""

from __future__ import annotations

import ctypes
from pathlib import Path

_FOLDER = Path(__file__).parent


def load(name: str) -> ctypes.CDLL:
    """Return the library of `name`.cpp; the header that all begin with is put before it.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails.
        OSError: what was compiled cannot be loaded.
    """
    # torch.compile's own way to a compiler: it finds one, tells processors apart, and keeps what it has compiled
    from torch._inductor.codecache import CppCodeCache

    sources = (_FOLDER / "vectors.h", _FOLDER / f"{name}.cpp")
    library: ctypes.CDLL = CppCodeCache.load("\n".join(source.read_text() for source in sources))
    library.panel_width.restype = ctypes.c_int64
    return library
