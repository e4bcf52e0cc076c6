"""Whether a drafter can serve with a target, asked before an engine without it has run for minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_redrafter.cli import options
from vllm_redrafter.cli.errors import CommandError


def check_pair(target: str, drafter: str) -> None:
    """Refuse what is no pair; the sizes of a target on the Hub are left to the engine.

    Raises:
        CommandError: one of them is no model, or the drafter is missing, broken, or of another target.
    """
    options.check_model("--target", target)
    options.check_model("--drafter", drafter)
    # torch is imported only now
    from vllm_redrafter.core import checkpoint, hub

    try:
        directory = hub.resolve(drafter)
        config = checkpoint.load_drafter(directory).config
        if Path(target).is_dir():
            sizes = _sizes(target)
            if sizes is not None:
                checkpoint.check_against_target(config, **sizes, target=target)
        checkpoint.check_tokenizer(directory, target)
    except ValueError as error:
        raise CommandError(f"--drafter: {error}") from None


def serving(target: str, drafter: str, **more: Any) -> list[str]:
    """Return what `vllm` takes to serve a pair; `more` goes into the speculative config."""
    config = json.dumps({"method": "redrafter", "model": drafter, **more})
    return ["serve", target, "--speculative-config", config]


def _sizes(target: str) -> dict[str, int] | None:
    """Return the sizes that a drafter must fit, or None of a target that transformers does not take."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(target).get_text_config()
        return {
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "num_layers": config.num_hidden_layers,
        }
    except (ValueError, AttributeError, StrictDataclassError):
        # vLLM may know more models, and says itself what is wrong with one
        return None
