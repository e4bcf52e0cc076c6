"""What tests of kernels run on."""

from __future__ import annotations

import pytest

from tests.kernels.interpreter import multiply_bf16


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interprets what a test launches, as tests/conftest.py has the kernels imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    multiply_bf16()
