"""Whether several engines can be up at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_redrafter.adapter.memory import available_bytes

_BYTES_PER_ENGINE = 5 * 2**29
"""An engine without its weights: KV cache 1 GiB, libraries and buffers 1 GiB, room."""


def engines_fit(targets: Sequence[str]) -> bool:
    """Return whether engines of these targets, directories or Hub ids, are likely to fit into free memory together."""
    if len(targets) > 1 and has_gpu():
        # one engine takes nearly all of a GPU's memory for its KV cache
        return False
    weights = sum(file.stat().st_size for target in targets for file in Path(target).glob("*.safetensors"))
    # 16-bit weights may be held in 32, and then packed once more
    return len(targets) * _BYTES_PER_ENGINE + 4 * weights <= available_bytes()


def has_gpu() -> bool:
    """Return whether engines run on a GPU."""
    import torch

    return torch.cuda.is_available()
