"""ReDrafter speculation for vLLM: a recurrent drafter, a token tree, a verification that changes nothing."""

from __future__ import annotations

__version__ = "0.1.0"
