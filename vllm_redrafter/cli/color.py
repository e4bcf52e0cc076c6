"""Whether and how text is coloured."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

CHOICES = ("auto", "always", "never")


class Style(NamedTuple):
    """Escape sequences; all empty where nothing is coloured."""

    drafted: str
    prompt: str
    end: str

    def paint(self, text: str, start: str) -> str:
        """Return `text` between an escape sequence of this style and its end."""
        return f"{start}{text}{self.end}" if start else text


def select(choice: str) -> Style:
    """Return the style for "always", "never", or "auto": a terminal that does not set NO_COLOR."""
    if choice == "always" or (choice == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")):
        return Style("\x1b[32m", "\x1b[1m", "\x1b[0m")
    return Style("", "", "")
