"""The entry point that vLLM calls in each of its processes, for every user of this machine."""

from __future__ import annotations


def register() -> None:
    """Make `"method": "redrafter"` known to vLLM; where nobody asks for it, nothing changes.

    Never raises: an exception here would stop every vLLM on the machine. What is wrong is said when the drafter is
    asked for, or by `vllm-redrafter doctor`.
    """
    from vllm_redrafter.adapter import patches

    patches.install()
