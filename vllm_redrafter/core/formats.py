"""The dialects of ReDrafter checkpoints: how each program spells its `config.json` and names its tensors.

Four are read (ours, Apple's, TensorRT-LLM's, the eplatero97 fork of `speculators`); ours and Apple's are written. All
four hold the same network, so what differs is translated here once and nothing behind this file knows where a drafter
came from.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any

from transformers import PretrainedConfig

from vllm_redrafter.core import apple
from vllm_redrafter.core.config import ReDrafterConfig

DIALECTS = {
    "redrafter": "vllm-redrafter's own",
    "apple": "Apple's",
    "trtllm": "TensorRT-LLM's",
    "eplatero": "the eplatero97 fork's",
}
"""The names by which a dialect is asked for, and whose it is."""

_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "hidden_size": (int,),
    "vocab_size": (int,),
    "exit_dim": (int, NoneType),
    "num_draft_layers": (int,),
    "rnn": (bool,),
    "draft_vocab_size": (int, NoneType),
    "tie_lm_head": (bool,),
    "top_k": (int, NoneType),
    "fused_layers": (list, NoneType),
    "emb_norm": (bool,),
    "beam_width": (int,),
    "draft_length": (int,),
    "num_speculative_tokens": (int,),
    "trained_draft_length": (int, NoneType),
    "verifier": (str, NoneType),
    "verifier_architectures": (list, NoneType),
}
_TYPE_NAMES = {int: "an integer", bool: "true or false", str: "a string", list: "a list", NoneType: "null"}
_BLOCKS = ("speculators_config", "transformer_layer_config")
_UPSTREAM_KEYS = (
    "model_type",
    "_name_or_path",
    "torch_dtype",
    "auto_map",
    "speculators_model_type",
    "speculators_version",
)

_TENSORRT_LLM_NAMES = {
    "redrafter_hidden_size": "hidden_size",
    "redrafter_exit_dim": "exit_dim",
    "redrafter_num_layers": "num_draft_layers",
    "redrafter_is_rnn": "rnn",
    "redrafter_num_beams": "beam_width",
    "redrafter_draft_len_per_beam": "draft_length",
}
_OLDER_TENSOR_NAMES = (
    (re.compile(r"input_projs\.(?:0\.)?(weight|bias)"), r"input_proj.\1"),
    (re.compile(r"(?:lm_heads|0)\.(\d+\.(?:linear\.weight|linear\.bias|weight))"), r"lm_head.\1"),
)


def parse_config(fields: Mapping[str, Any], directory: str) -> ReDrafterConfig:
    """Return the configuration that a `config.json` of any known dialect describes.

    Args:
        directory: where the file stands, for the messages.

    Raises:
        ValueError: it describes another kind of model, lacks a field, or holds one that is unknown or unusable.
    """
    where = f"config.json of {directory!r}"
    dialect = dialect_of(fields)
    if dialect == "redrafter":
        values = _ours(fields, where)
    elif dialect == "eplatero":
        values = _eplatero(fields, where)
    elif dialect == "trtllm":
        values = _tensorrt_llm(fields)
    elif dialect == "apple":
        values = apple.parse_fields(fields)
    else:
        raise ValueError(_other_kind(fields, directory))
    return _build(values, where)


def dialect_of(fields: Mapping[str, Any]) -> str | None:
    """Return which of `DIALECTS` a `config.json` is written in, or None where it is no ReDrafter drafter's."""
    kind = _kind(fields)
    if kind == ReDrafterConfig.model_type:
        return "redrafter"
    if kind == "recurrent_drafting":
        return "eplatero"
    if any(name in fields for name in _TENSORRT_LLM_NAMES):
        return "trtllm"
    return "apple" if kind == apple.MODEL_TYPE else None


def tensor_name(stored_name: str) -> str | None:
    """Return the name under which `ReDrafter` holds a stored tensor, or None where no forward pass uses it."""
    if stored_name == "emb_norm.weight":
        return None
    for pattern, replacement in _OLDER_TENSOR_NAMES:
        if match := pattern.fullmatch(stored_name):
            return match.expand(replacement)
    return stored_name


def _ours(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = {*_FIELD_TYPES, *_BLOCKS, *_UPSTREAM_KEYS, *PretrainedConfig().to_dict()}
    unknown = [_with_nearest(name) for name in fields if name not in known]
    if unknown:
        raise ValueError(f"{where} has keys that a ReDrafter config does not know: {', '.join(unknown)}")
    values = {name: fields[name] for name in _FIELD_TYPES if name in fields}
    for path, name in (
        (("transformer_layer_config", "hidden_size"), "hidden_size"),
        (("transformer_layer_config", "vocab_size"), "vocab_size"),
        (("speculators_config", "verifier", "name_or_path"), "verifier"),
        (("speculators_config", "verifier", "architectures"), "verifier_architectures"),
    ):
        _agree(values, name, ".".join(path), _lookup(fields, where, path), where)
    proposal = _first_proposal(fields, where)
    nested = "speculators_config.proposal_methods[0].speculative_tokens"
    _agree(values, "num_speculative_tokens", nested, proposal.get("speculative_tokens"), where)
    return values


def _tensorrt_llm(fields: Mapping[str, Any]) -> dict[str, Any]:
    return apple.parse_fields(fields) | {
        ours: fields[theirs] for theirs, ours in _TENSORRT_LLM_NAMES.items() if theirs in fields
    }


def _eplatero(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    proposal = _first_proposal(fields, where)
    beam_length = proposal.get("beam_length", 4)
    if type(beam_length) is not int or beam_length < 2:
        raise ValueError(f"{where}: beam_length is {beam_length!r}, but it counts the init token: it must be 2 or more")
    values = apple.parse_fields(fields) | {
        "beam_width": proposal.get("beam_width", 10),
        # their beam_length counts the init token
        "draft_length": beam_length - 1,
        "top_k": proposal.get("top_k", apple.TOP_K),
        "trained_draft_length": None,
    }
    verifier = _lookup(fields, where, ("speculators_config", "verifier", "name_or_path"))
    architectures = _lookup(fields, where, ("speculators_config", "verifier", "architectures"))
    return values | {"verifier": verifier, "verifier_architectures": architectures}


def _build(values: dict[str, Any], where: str) -> ReDrafterConfig:
    for name in ("hidden_size", "vocab_size", "exit_dim", "num_draft_layers"):
        if name not in values:
            raise ValueError(f"{where} lacks {name!r}: add it, or export the drafter again")
    for name, value in values.items():
        if type(value) not in _FIELD_TYPES[name]:
            allowed = " or ".join(_TYPE_NAMES[kind] for kind in _FIELD_TYPES[name])
            raise ValueError(f"{where}: {name} is {value!r}, but it must be {allowed}")
    config = ReDrafterConfig(**values)
    try:
        config.check()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return config


def _kind(fields: Mapping[str, Any]) -> object:
    return fields.get("speculators_model_type") or fields.get("model_type")


def _other_kind(fields: Mapping[str, Any], directory: str) -> str:
    """Return what to tell someone who passed a model that is no ReDrafter drafter."""
    kind = _kind(fields)
    architectures = str(fields.get("architectures")).lower()
    for family in ("eagle", "medusa"):
        if family in architectures or any(name.startswith(f"{family}_") for name in fields):
            kind = kind if kind and family in str(kind) else family
    if not kind:
        return (
            f"config.json of {directory!r} has no model_type: pass a ReDrafter drafter, and if this is one of Apple's, "
            'write "model_type": "recurrent_drafting_drafter" into it'
        )
    article = "an" if str(kind)[0] in "aeiou" else "a"
    return (
        f"{directory!r} is {article} {kind} model, not a ReDrafter drafter: "
        'pass the drafter\'s directory as "model" in --speculative-config'
    )


def _with_nearest(name: str) -> str:
    nearest = difflib.get_close_matches(name, _FIELD_TYPES, n=1)
    return f"{name!r} (did you mean {nearest[0]!r}?)" if nearest else f"{name!r} (remove it)"


def _first_proposal(fields: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    methods = _lookup(fields, where, ("speculators_config", "proposal_methods")) or [{}]
    if not isinstance(methods, list) or not isinstance(methods[0], dict):
        raise ValueError(f"{where}: proposal_methods is {methods!r}, but it must be a list of objects")
    first: Mapping[str, Any] = methods[0]
    return first


def _lookup(fields: Mapping[str, Any], where: str, path: tuple[str, ...]) -> Any:
    """Return the value at `path` in nested objects, or None where it is absent."""
    value: Any = fields
    for depth, name in enumerate(path):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {'.'.join(path[:depth])} is {value!r}, but it must be an object")
        value = value.get(name)
    return value


def _agree(values: dict[str, Any], name: str, nested: str, found: Any, where: str) -> None:
    """Take `found` where the flat field is missing; where both stand they must agree."""
    if found is None:
        return
    if (values.setdefault(name, found) or None) != (found or None):
        raise ValueError(f"{where}: {name} is {values[name]!r}, but {nested} is {found!r}: make them agree")
