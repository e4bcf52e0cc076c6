from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

# Without it MLX's CPU backend compiles C++ for every fused kernel, which takes longer than the tests.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

IS_INSTALLED = all(importlib.util.find_spec(name) for name in ("mlx", "mlx_lm"))


class _Skipped(pytest.Module):
    def collect(self) -> NoReturn:
        pytest.skip("mlx and mlx-lm are not installed: pip install 'vllm-redrafter[mlx]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    if IS_INSTALLED:
        return None
    return _Skipped.from_parent(parent, path=module_path)
