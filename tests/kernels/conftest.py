"""What tests of kernels run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.interpreter import multiply_bf16
from vllm_redrafter.kernels import backend


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interprets what a test launches, as tests/conftest.py has the kernels imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    multiply_bf16()
    # chosen once in a process, and other tests choose otherwise
    backend.cache_clear()
    yield
    backend.cache_clear()
