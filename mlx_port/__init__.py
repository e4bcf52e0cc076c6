"""ReDrafter's tree speculation in MLX, over the models of stock mlx-lm, for Apple silicon.

    from mlx_port import load, stream_generate

    target, tokenizer, drafter = load("mlx-community/Llama-3.2-3B-Instruct-4bit", drafter="D")
    for response in stream_generate(target, tokenizer, "Once", drafter):
        print(response.text, end="")

It reads the same drafter checkpoints as `vllm_redrafter` and imports nothing of it, nor torch: what the two share is
the file format, the names of their files, and the tests that compare them.
"""

from __future__ import annotations

import importlib
import importlib.util

if importlib.util.find_spec("mlx_lm") is None or importlib.util.find_spec("mlx") is None:
    raise ImportError("mlx_port needs mlx and mlx-lm: pip install 'vllm-redrafter[mlx]'")
try:
    importlib.import_module("mlx.core")
except ImportError as _error:
    raise ImportError(
        f"mlx has no backend here ({_error}): on Linux it comes with an extra, pip install 'mlx[cpu]' or 'mlx[cuda13]'"
    ) from None

from mlx_port.pair import Pair, load
from mlx_port.stream import Response, stream_generate

__all__ = ["Pair", "Response", "load", "stream_generate"]
