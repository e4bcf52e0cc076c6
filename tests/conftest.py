"""Imports the kernels for Triton's interpreter where there is no GPU.

Triton asks for TRITON_INTERPRET when it is imported and again when a kernel is, so both happen here, before any test
can import Triton otherwise. The variable does not stay: what a test starts runs as it would anywhere.
"""

from __future__ import annotations

import importlib.util
import pkgutil

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from vllm_redrafter import kernels

        for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
            importlib.import_module(module.name)
