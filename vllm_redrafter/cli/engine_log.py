"""Reading an engine's log: which of its thousand lines says why it died."""

from __future__ import annotations

import re
from pathlib import Path

_PREFIX = re.compile(r"^(?:\([\w .=+-]+\) )*(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] )?")
_ERROR = re.compile(r"^(?:[A-Za-z_][\w]*\.)*[A-Z]\w*(?:Error|Exception|Unsupported|NotFound): (?P<message>.+)")
_FIELD_ERROR = re.compile(r"^\s+(?:Value error|Assertion failed), (?P<message>.+?)(?: \[type=.*)?$")
# what vLLM and pydantic put around the reason
_WRAPPERS = ("Engine core initialization failed", "EngineCore encountered an issue", "validation error")
_TAIL_BYTES = 256 * 1024


def read_reason(path: Path) -> str | None:
    """Return the message of the last exception in a log, without the wrappers around it, or None."""
    with path.open("rb") as log:
        log.seek(0, 2)
        log.seek(max(0, log.tell() - _TAIL_BYTES))
        lines = log.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        plain = _PREFIX.sub("", line, count=1)
        found = _FIELD_ERROR.match(plain) or _ERROR.match(plain)
        if found and not any(wrapper in found["message"] for wrapper in _WRAPPERS):
            return found["message"].strip()
    return None
