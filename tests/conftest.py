"""Imports the kernels for Triton's interpreter, and runs the tests that start engines first.

Triton asks for TRITON_INTERPRET when it is imported and again when a kernel is, so both happen here, before any test
can import Triton otherwise. The variable does not stay: what a test starts runs as it would anywhere. On a GPU the
kernels are checked by `vllm-redrafter bench kernels`.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec

import pytest

from vllm_redrafter import kernels

if find_spec("triton") is not None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
            importlib.import_module(module.name)
        importlib.import_module("tests.kernels.interpreter").patch_the_language_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put those files first of which a test takes minutes: begun last, they would leave the other processes idle."""
    items.sort(key=lambda item: not {"engine", "examples"}.intersection(item.path.parts))
