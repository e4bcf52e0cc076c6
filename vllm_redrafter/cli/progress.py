"""Progress on stderr: one line that rewrites itself on a terminal, and a line per stage elsewhere."""

from __future__ import annotations

import sys

_BAR_WIDTH = 24


class Progress:
    """Says on stderr what is going on; use `say` for a stage and `count` for a bar within it."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._rewrites = sys.stderr.isatty()
        self._open_line = False

    def say(self, text: str) -> None:
        """Show a stage."""
        if not self._quiet:
            self.clear()
            self._write(text, keep=not self._rewrites)

    def count(self, text: str, done: int, total: int) -> None:
        """Show a bar; off a terminal only its end is written."""
        if self._quiet or (not self._rewrites and done < total):
            return
        filled = _BAR_WIDTH * done // max(1, total)
        self.clear()
        self._write(f"{text} [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {done}/{total}", keep=not self._rewrites)

    def clear(self) -> None:
        """Remove the line that is being rewritten, before something else is printed."""
        if self._open_line:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._open_line = False

    def _write(self, text: str, *, keep: bool) -> None:
        print(text, end="\n" if keep else "", file=sys.stderr, flush=True)
        self._open_line = not keep
