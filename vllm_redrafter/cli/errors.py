"""What a command says when it cannot go on."""

from __future__ import annotations

FAILED = 1
USAGE = 2
INTERRUPTED = 130


class CommandError(Exception):
    """Ends the command: the message is one sentence with the value, the rule and the remedy."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status
