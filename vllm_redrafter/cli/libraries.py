"""Libraries of the extras: whether they are there, and silence from those that talk."""

from __future__ import annotations

import importlib.util
import os

from vllm_redrafter.cli.errors import CommandError


def require_training() -> None:
    """Refuse to go on without the extra `train`, and keep the libraries' own bars and advice off the terminal.

    Raises:
        CommandError: naming the extra.
    """
    require("accelerate", "train", "training")
    # read when the libraries are imported
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def require(package: str, extra: str, what_for: str) -> None:
    """Refuse to go on without a package of one of our extras.

    Raises:
        CommandError: naming the extra.
    """
    if importlib.util.find_spec(package) is None:
        raise CommandError(f"{what_for} needs {package}, which is not installed: pip install 'vllm-redrafter[{extra}]'")
