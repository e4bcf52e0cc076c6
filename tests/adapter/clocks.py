"""Clocks that say what a test wants."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vllm_redrafter.adapter.searcher import Searcher


def tell_seconds(monkeypatch: pytest.MonkeyPatch, told: Callable[[Searcher, int], float]) -> None:
    """Let searches take what `told` says of a searcher and a number of requests, beside each other."""
    monkeypatch.setattr(
        Searcher,
        "seconds_beside",
        lambda self, other, num_requests: [told(self, num_requests), told(other, num_requests)],
    )
