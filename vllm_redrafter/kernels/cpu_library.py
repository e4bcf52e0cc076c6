"""The C++ of the kernels for CPUs, compiled where it runs."""

from __future__ import annotations

import ctypes
from pathlib import Path

_FOLDER = Path(__file__).parent


class NotCompiledError(RuntimeError):
    """A kernel cannot be compiled here; one line says why."""


def load(name: str) -> ctypes.CDLL:
    """Return the library of `name`.cpp; the header that all begin with is put before it.

    Raises:
        NotCompiledError: there is no C++ compiler, it fails, or its cache holds half a library.
    """
    # torch.compile's own way to a compiler: it finds one, tells processors apart, and keeps what it has compiled
    from torch._inductor.codecache import CppCodeCache

    sources = (_FOLDER / "vectors.h", _FOLDER / f"{name}.cpp")
    try:
        library: ctypes.CDLL = CppCodeCache.load("\n".join(source.read_text() for source in sources))
    except (RuntimeError, OSError) as error:
        raise NotCompiledError(str(error).partition("\n")[0]) from error
    library.panel_width.restype = ctypes.c_int64
    return library
