"""Apple's dialect: the `config.json` of `apple/ml-recurrent-drafter`, which its PyTorch and its MLX programs share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_redrafter.core.config import ReDrafterConfig

MODEL_TYPE = "recurrent_drafting_drafter"
TOP_K = 50
"""Candidates that Apple's programs keep per beam, whatever the config says."""

_FIELDS = ("hidden_size", "vocab_size", "exit_dim", "num_draft_layers", "rnn", "emb_norm")
_TRAINED_LENGTH = 5


def parse_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of our configuration that a `config.json` of Apple's determines."""
    return {
        "rnn": False,
        "top_k": TOP_K,
        "trained_draft_length": _TRAINED_LENGTH,
        **{name: fields[name] for name in _FIELDS if name in fields},
    }


def write_fields(config: ReDrafterConfig, directory: str) -> dict[str, Any]:
    """Return the `config.json` with which Apple's programs load the drafter.

    Beam shape and target are not part of it: there they are options of the command line.

    Args:
        directory: where it is to stand, for the messages.

    Raises:
        ValueError: Apple's format has no place for something that this drafter has; what, and what to do.
    """
    rule = f"the drafter cannot be written to {directory!r} in Apple's format, which has no place for"
    if config.draft_vocab_size is not None:
        raise ValueError(
            f"{rule} a draft vocabulary (its head knows {config.draft_vocab_size} of {config.vocab_size} tokens): "
            "train a drafter with --draft-vocab-size all"
        )
    if config.tie_lm_head:
        raise ValueError(
            f"{rule} a head that is the target's: store the target's lm_head.weight as "
            f"'lm_head.{config.num_draft_layers}.weight' and set tie_lm_head to false first"
        )
    if config.fused_layers:
        raise ValueError(
            f"{rule} fused layers (it sees the outputs of {config.fused_layers} besides the last hidden state): "
            "train a drafter without fused_layers"
        )
    # a top_k beyond the vocabulary keeps all of it
    if min(config.top_k or config.vocab_size, config.vocab_size) != min(TOP_K, config.vocab_size):
        raise ValueError(
            f"{rule} top_k {config.top_k or 'null'} (its programs always keep {TOP_K} candidates): set top_k to "
            f"{TOP_K} in its config.json first, which changes what is drafted and never the text"
        )
    fields: dict[str, Any] = {name: getattr(config, name) for name in _FIELDS}
    # with it Apple's MLX program also expects the tensor
    if not config.emb_norm:
        del fields["emb_norm"]
    return fields | {"model_type": MODEL_TYPE, "architectures": ["Drafter"]}
