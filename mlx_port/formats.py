"""The two dialects of `config.json` that are read, ours and Apple's, and the names that their tensors carry.

Both hold the same network, so what differs is translated here once and nothing behind this file knows where a drafter
came from.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import NoneType
from typing import Any

from mlx_port.config import ReDrafterConfig

_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "hidden_size": (int,),
    "vocab_size": (int,),
    "exit_dim": (int, NoneType),
    "num_draft_layers": (int,),
    "rnn": (bool,),
    "draft_vocab_size": (int, NoneType),
    "tie_lm_head": (bool,),
    "top_k": (int, NoneType),
    "beam_width": (int,),
    "draft_length": (int,),
    "num_speculative_tokens": (int,),
    "verifier": (str, NoneType),
}
_OTHER_FIELDS = ("fused_layers", "emb_norm", "trained_draft_length", "verifier_architectures")
_TYPE_NAMES = {int: "an integer", bool: "true or false", str: "a string", NoneType: "null"}
_APPLE_TYPE = "recurrent_drafting_drafter"
MODEL_TYPES = ("redrafter", _APPLE_TYPE)
"""What a drafter calls itself."""

_APPLE = {"rnn": False, "top_k": 50}


def parse_config(fields: Mapping[str, Any], where: str) -> ReDrafterConfig:
    """Return the configuration that a `config.json` of either dialect describes.

    Args:
        where: the file's name, for the messages.

    Raises:
        ValueError: it describes another kind of model, lacks a field, or holds one that is misspelt or unusable.
    """
    kind = fields.get("speculators_model_type") or fields.get("model_type")
    values = {name: fields[name] for name in _FIELD_TYPES if name in fields}
    if kind == _APPLE_TYPE:
        values = _APPLE | values
    elif kind not in MODEL_TYPES:
        raise ValueError(
            f'{where} says model_type {kind!r}, but a ReDrafter drafter says "redrafter" or, if it is Apple\'s, '
            '"recurrent_drafting_drafter": pass the drafter\'s directory or Hub id'
        )
    _check_spelling(fields, where)
    if fields.get("fused_layers") is not None:
        raise ValueError(
            f"{where}: fused_layers is {fields['fused_layers']!r}, but here a drafter sees the target's last hidden "
            "state alone: pass one that was trained without fused_layers"
        )
    for name in ("hidden_size", "vocab_size"):
        if name not in values:
            raise ValueError(f"{where} lacks {name!r}: add it, or export the drafter again")
    for name, value in values.items():
        # exactly: to Python, True is an integer
        if type(value) not in _FIELD_TYPES[name]:
            allowed = " or ".join(_TYPE_NAMES[kind] for kind in _FIELD_TYPES[name])
            raise ValueError(f"{where}: {name} is {value!r}, but it must be {allowed}")
    if values.get("exit_dim") is None:
        values["exit_dim"] = 2 * values["hidden_size"]
    try:
        return ReDrafterConfig(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_spelling(fields: Mapping[str, Any], where: str) -> None:
    """Refuse keys that are almost a field's name; what else stands in the file belongs to other programs."""
    known = (*_FIELD_TYPES, *_OTHER_FIELDS)
    for name in fields:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if nearest and name not in known:
            raise ValueError(f"{where} has a key {name!r}: did you mean {nearest[0]!r}?")
