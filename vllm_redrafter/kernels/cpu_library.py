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
        NotCompiledError: there is no C++ compiler, it fails, or what it makes cannot be loaded.
    """
    source = "\n".join(file.read_text() for file in (_FOLDER / "vectors.h", _FOLDER / f"{name}.cpp"))
    try:
        library = _compiled(source)
    except (RuntimeError, OSError) as error:
        raise NotCompiledError(str(error).partition("\n")[0]) from error
    library.panel_width.restype = ctypes.c_int64
    return library


def _compiled(source: str) -> ctypes.CDLL:
    # torch.compile's own way to a compiler: it finds one, tells processors apart, and keeps what it has compiled
    from torch._inductor.codecache import CppCodeCache

    library: ctypes.CDLL
    try:
        library = CppCodeCache.load(source)
    except OSError:
        # a compiler that was killed has left half a library, under a name that follows from the source
        library = CppCodeCache.load(f"{source}\n// again\n")
    return library
