"""Drafters on disk or on the Hub: `config.json` and safetensors; pickles are never read.

The directories are those that the torch package reads and writes. Whatever does not fit is refused here, with the
tensor's or the field's name, before anything is built on it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from mlx import nn
from mlx.utils import tree_flatten

from mlx_port import formats
from mlx_port.config import ReDrafterConfig
from mlx_port.drafter import ReDrafter

_CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_NAMED = 5
_UNUSED = "emb_norm.weight"
_WEIGHT_DTYPES = (mx.float16, mx.bfloat16, mx.float32)
_BITS = (4, 8)
_GROUP_SIZES = (32, 64, 128)
_OLDER_NAMES = (
    (re.compile(r"input_projs\.(?:0\.)?(weight|bias)"), r"input_proj.\1"),
    (re.compile(r"(?:lm_heads|0)\.(\d+\.(?:linear\.weight|linear\.bias|weight))"), r"lm_head.\1"),
)


def load_drafter(
    model: str | Path,
    *,
    dtype: mx.Dtype | None = None,
    bits: int | None = None,
    group_size: int = 64,
    revision: str | None = None,
) -> ReDrafter:
    """Return the drafter of a directory or Hub id, its weights in memory.

    Args:
        dtype: of the weights; as they are stored by default.
        bits: 4 or 8 quantises the linear layers.
        group_size: 32, 64 or 128 weights share a scale.

    Raises:
        ValueError: it cannot be found, its config or tensors are not those of a drafter, or it cannot be quantised so.
    """
    directory = resolve(str(model), revision)
    config = load_config(directory)
    drafter = ReDrafter(config)
    tensors = _split_input_proj(_read_tensors(directory), config)
    target_ids = _take_draft_vocabulary(tensors, config, directory)
    _check_shapes({name: array.shape for name, array in tree_flatten(drafter.parameters())}, tensors, directory)
    drafter.load_weights([(name, _converted(array, dtype, name, directory)) for name, array in tensors.items()])
    if target_ids is not None:
        drafter.set_draft_vocabulary(target_ids)
    if bits is not None:
        quantize(drafter, bits, group_size)
    mx.eval(drafter.parameters())
    return drafter


def load_config(directory: Path) -> ReDrafterConfig:
    """Return the configuration of the drafter in `directory`.

    Raises:
        ValueError: there is no readable `config.json`, or it does not describe a usable drafter.
    """
    path = directory / _CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"no {_CONFIG_FILE} in {str(directory)!r}: pass a directory that holds a drafter")
    return formats.parse_config(_read_json(path), str(path))


def is_drafter(directory: Path) -> bool:
    """Return whether the `config.json` in `directory` is a drafter's."""
    fields = _read_json(directory / _CONFIG_FILE)
    return (fields.get("speculators_model_type") or fields.get("model_type")) in formats.MODEL_TYPES


def resolve(model: str, revision: str | None = None) -> Path:
    """Return the local directory that holds the drafter; a Hub id is fetched, JSON and safetensors only.

    Raises:
        ValueError: there is no such drafter, or it cannot be reached.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, RepositoryNotFoundError):
        reason = "pass a directory with config.json or a Hub id"
    except LocalEntryNotFoundError:
        reason = "it is no directory here, and the Hub cannot be reached; check the network and HF_HUB_OFFLINE"
    raise ValueError(f"no drafter at {model!r}: {reason}")


def quantize(drafter: ReDrafter, bits: int, group_size: int) -> None:
    """Quantise all linear layers of a drafter.

    Raises:
        ValueError: MLX has no such quantisation, or a layer's width is no multiple of the group size.
    """
    if bits not in _BITS or group_size not in _GROUP_SIZES:
        raise ValueError(
            f"a drafter cannot be quantised to {bits} bits in groups of {group_size}: "
            f"bits must be {' or '.join(map(str, _BITS))} and the group size one of {', '.join(map(str, _GROUP_SIZES))}"
        )
    widths = {module.weight.shape[1] for _, module in drafter.named_modules() if isinstance(module, nn.Linear)}
    odd = sorted(width for width in widths if width % group_size)
    if odd:
        raise ValueError(
            f"a drafter with a layer {odd[0]} wide cannot be quantised in groups of {group_size}: "
            "choose a group size that divides the width, or leave it unquantised"
        )
    nn.quantize(drafter, group_size=group_size, bits=bits)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}): download or export it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}, but it must be a JSON object")
    return content


def _read_tensors(directory: Path) -> dict[str, mx.array]:
    """Return the drafter's tensors under our names; MLX reads each when it is used."""
    tensors: dict[str, mx.array] = {}
    for file in _weight_files(directory):
        try:
            content: dict[str, mx.array] = mx.load(str(file))
        except RuntimeError as error:
            raise ValueError(
                f"{str(file)!r} is not a readable safetensors file ({error}): "
                "it is damaged or cut short (or a git-lfs pointer), download it again"
            ) from None
        for stored_name, array in content.items():
            if stored_name != _UNUSED:
                tensors[_our_name(stored_name)] = array
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _WEIGHTS_FILE).is_file():
        return [directory / _WEIGHTS_FILE]
    index = directory / _INDEX_FILE
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{str(index)!r} has no weight_map of tensor names to file names: export it again")
        # the name alone: a map cannot lead out of the directory
        return [directory / Path(name).name for name in sorted(set(weight_map.values()))]
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if not pickles:
        raise ValueError(
            f"no {_WEIGHTS_FILE} in {str(directory)!r}: pass a drafter that has its weights as safetensors "
            "(pickles are neither fetched nor loaded)"
        )
    raise ValueError(
        f"{str(directory)!r} holds pickled weights only ({', '.join(pickles)}), never loaded because they can run "
        "code: convert to safetensors, with "
        f'`safetensors.torch.save_file(torch.load("{pickles[0]}", weights_only=True), "{_WEIGHTS_FILE}")`'
    )


def _our_name(stored_name: str) -> str:
    for pattern, replacement in _OLDER_NAMES:
        if match := pattern.fullmatch(stored_name):
            return match.expand(replacement)
    return stored_name


def _split_input_proj(tensors: dict[str, mx.array], config: ReDrafterConfig) -> dict[str, mx.array]:
    """Return the tensors with the input projection's two halves apart, as `ReDrafter` holds them."""
    weight = tensors.get("input_proj.weight")
    if weight is None or weight.ndim != 2 or "input_proj.bias" not in tensors:
        return tensors
    rest = {name: array for name, array in tensors.items() if not name.startswith("input_proj.")}
    return rest | {
        "context_proj.weight": weight[:, : config.hidden_size],
        "context_proj.bias": tensors["input_proj.bias"],
        "recurrent_proj.weight": weight[:, config.hidden_size :],
    }


def _take_draft_vocabulary(tensors: dict[str, mx.array], config: ReDrafterConfig, directory: Path) -> mx.array | None:
    """Return the target's ids of a reduced head's rows, and remove the two tensors that store them."""
    if config.draft_vocab_size is None:
        return None
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if d2t is None or t2d is None:
        raise ValueError(
            f"the drafter in {str(directory)!r} has a draft vocabulary, but no d2t and t2d: export it again"
        )
    target_ids = [offset + draft_id for draft_id, offset in enumerate(d2t.tolist())]
    marked = [token_id for token_id, is_marked in enumerate(t2d.tolist()) if is_marked]
    if target_ids != marked or len(target_ids) != config.draft_vocab_size:
        raise ValueError(
            f"d2t and t2d in {str(directory)!r} contradict each other: d2t names {len(target_ids)} tokens, t2d "
            f"{len(marked)}, and they are not the same ones in ascending order; set the draft vocabulary again"
        )
    return mx.array(target_ids, mx.int32)


def _check_shapes(expected: dict[str, tuple[int, ...]], found: dict[str, mx.array], directory: Path) -> None:
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    extra = [f"{name} {list(array.shape)}" for name, array in found.items() if name not in expected]
    misshapen = [
        f"{name} (expected {list(shape)}, found {list(found[name].shape)})"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    faults = [
        f"{label}: {', '.join(names[:_MAX_NAMED])}"
        for label, names in (("missing", missing), ("not expected", extra), ("of another shape", misshapen))
        if names
    ]
    if faults:
        raise ValueError(
            f"the tensors in {str(directory)!r} are not those that its {_CONFIG_FILE} describes; {'; '.join(faults)}. "
            "Correct the config, or export the drafter again"
        )


def _converted(array: mx.array, dtype: mx.Dtype | None, name: str, directory: Path) -> mx.array:
    if array.dtype not in _WEIGHT_DTYPES:
        raise ValueError(
            f"tensor {name!r} in {str(directory)!r} is {array.dtype}, but weights must be float16, bfloat16 or "
            "float32: export it unquantised, `bits` quantises it here"
        )
    converted = array if dtype is None else array.astype(dtype)
    # waits for the file: a drafter is loaded once
    if not mx.isfinite(converted).all():
        raise ValueError(
            f"tensor {name!r} in {str(directory)!r} holds NaN or infinity as {converted.dtype}: "
            "use bfloat16 or float32, or export the drafter again"
        )
    return converted
