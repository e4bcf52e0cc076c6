"""Drafters on disk: a directory with `config.json` and safetensors; pickles are never read.

`load_drafter` reads every dialect of `formats`, `save_drafter` writes ours. Whatever does not fit is refused here, with
the tensor's or the field's name, before anything is built on it.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_redrafter.core import formats, hub
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

_CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_NAMED = 5


class _StoredTensor(NamedTuple):
    """A tensor in a safetensors file, not yet read."""

    file: Path
    name: str
    shape: tuple[int, ...]


def load_config(directory: Path) -> ReDrafterConfig:
    """Return the configuration of the drafter in `directory`, whatever dialect it is written in.

    Raises:
        ValueError: there is no readable `config.json`, or it does not describe a usable drafter.
    """
    path = directory / _CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"no {_CONFIG_FILE} in {str(directory)!r}: pass a directory that holds a drafter")
    return formats.parse_config(_read_json(path), str(directory))


def load_drafter(model: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32) -> ReDrafter:
    """Return the drafter of a directory or Hub id in `dtype` on the CPU, ready for inference: eval mode, no gradients.

    Raises:
        ValueError: it cannot be found, or its config or its tensors are not those of a drafter.
    """
    directory = hub.resolve(str(model), revision)
    config = load_config(directory)
    # on the meta device nothing is allocated: the tensors read below become the parameters
    with torch.device("meta"):
        drafter = ReDrafter(config)
    expected = {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}
    stored = _catalogue(_weight_files(directory))
    _check_shapes(expected, stored, directory)
    state = {name: _read_tensor(stored[name], name, dtype) for name in expected}
    drafter.load_state_dict(state, assign=True)
    _check_draft_vocabulary(drafter, str(directory))
    return drafter.requires_grad_(False).eval()


def save_drafter(drafter: ReDrafter, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors`, each appearing whole or not at all.

    Args:
        dtype: floating-point type on disk; None keeps the drafter's own.

    Raises:
        ValueError: the drafter could not be loaded back: bad field, NaN or infinity, unset draft vocabulary.
    """
    where = str(directory)
    formats.parse_config(drafter.config.to_dict(), where)
    _check_draft_vocabulary(drafter, where)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in drafter.state_dict().items():
        if tensor.is_floating_point():
            tensor = _converted(tensor, dtype or tensor.dtype, name, where)
        state[name] = tensor.cpu().contiguous()
    config = copy.deepcopy(drafter.config)
    config.architectures = [type(drafter).__name__]
    config.dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())

    if directory.exists() and not directory.is_dir():
        raise ValueError(f"a drafter cannot be saved to {where!r}: it is a file, pass a directory")
    directory.mkdir(parents=True, exist_ok=True)
    config_part = directory / f".{_CONFIG_FILE}.{os.getpid()}.part"
    weights_part = directory / f".{_WEIGHTS_FILE}.{os.getpid()}.part"
    try:
        config_part.write_text(config.to_json_string(), encoding="utf-8")
        save_file(state, weights_part, metadata={"format": "pt"})
        os.replace(weights_part, directory / _WEIGHTS_FILE)
        os.replace(config_part, directory / _CONFIG_FILE)
    finally:
        config_part.unlink(missing_ok=True)
        weights_part.unlink(missing_ok=True)


def check_against_target(config: ReDrafterConfig, *, hidden_size: int, vocab_size: int, target: str) -> None:
    """Refuse a drafter whose sizes are not those of the target.

    Args:
        vocab_size: the one in the target's config, which may be padded beyond its tokenizer's.
        target: the target's name, for the message.

    Raises:
        ValueError: naming both sides' numbers.
    """
    differences = [
        f"{name} {ours} where the target has {theirs}"
        for name, ours, theirs in (
            ("hidden_size", config.hidden_size, hidden_size),
            ("vocab_size", config.vocab_size, vocab_size),
        )
        if ours != theirs
    ]
    if differences:
        origin = f" (trained for {config.verifier!r})" if config.verifier else ""
        raise ValueError(
            f"the drafter{origin} does not fit the target {target!r}: it has {' and '.join(differences)}; "
            "pass a drafter that was trained for this target"
        )


def check_tokenizer(drafter_directory: Path, target_directory: Path) -> None:
    """Refuse a drafter that carries another tokenizer than the target; does nothing where either carries none.

    Raises:
        ValueError: the two `tokenizer.json` give different ids, or one of them cannot be read.
    """
    paths = [directory / "tokenizer.json" for directory in (drafter_directory, target_directory)]
    if not all(path.is_file() for path in paths):
        return
    ours, theirs = (_token_ids(path) for path in paths)
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if different:
        token = different[0]
        raise ValueError(
            f"the drafter's tokenizer is not the target's: {len(different)} tokens have one id in {str(paths[0])!r} "
            f"and another in {str(paths[1])!r} ({token!r}: {ours.get(token)} and {theirs.get(token)}); "
            "pass a drafter that was trained for this target"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}): download or export it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}, but it must be a JSON object")
    return content


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _WEIGHTS_FILE).is_file():
        return [directory / _WEIGHTS_FILE]
    index = directory / _INDEX_FILE
    if index.is_file():
        return _shards(index)
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


def _shards(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{str(index)!r} has no weight_map of tensor names to file names: export the drafter again")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if file.parent != index.parent:
            raise ValueError(f"{str(index)!r} names {str(file)!r}, which is not beside it: export the drafter again")
        if not file.is_file():
            raise ValueError(f"{str(index)!r} names {file.name!r}, which is not there: download the drafter again")
    return files


def _catalogue(files: Iterable[Path]) -> dict[str, _StoredTensor]:
    """Return what the files hold under the drafter's own names; no tensor is read."""
    stored: dict[str, _StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                names = content.keys()
                shapes = {name: tuple(content.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise ValueError(
                f"{str(file)!r} is not a readable safetensors file ({error}): "
                "it is damaged or cut short (or a git-lfs pointer), download it again"
            ) from None
        for stored_name, shape in shapes.items():
            name = formats.tensor_name(stored_name)
            if name is None:
                continue
            if name in stored:
                other = stored[name]
                raise ValueError(
                    f"tensor {name!r} is there twice, as {other.name!r} in {str(other.file)!r} and as {stored_name!r} "
                    f"in {file.name!r}: remove one"
                )
            stored[name] = _StoredTensor(file, stored_name, shape)
    return stored


def _check_shapes(expected: dict[str, tuple[int, ...]], stored: dict[str, _StoredTensor], directory: Path) -> None:
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in stored]
    extra = [f"{tensor.name} {list(tensor.shape)}" for name, tensor in stored.items() if name not in expected]
    misshapen = [
        f"{name} (expected {list(shape)}, found {list(stored[name].shape)})"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    faults = [
        f"{label}: {_some(names)}"
        for label, names in (("missing", missing), ("not expected", extra), ("of another shape", misshapen))
        if names
    ]
    if faults:
        raise ValueError(
            f"the tensors in {str(directory)!r} are not those that its {_CONFIG_FILE} describes; {'; '.join(faults)}. "
            "Correct the config, or export the drafter again"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _read_tensor(stored: _StoredTensor, name: str, dtype: torch.dtype) -> torch.Tensor:
    with safe_open(stored.file, framework="pt") as content:
        tensor: torch.Tensor = content.get_tensor(stored.name)
    wanted = {"d2t": torch.int64, "t2d": torch.bool}.get(name)
    if wanted is not None:
        if tensor.dtype != wanted:
            raise ValueError(f"tensor {name!r} in {str(stored.file)!r} is {tensor.dtype}, but it must be {wanted}")
        return tensor
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise ValueError(
            f"tensor {name!r} in {str(stored.file)!r} is {tensor.dtype}, but weights must be torch.float16, "
            "torch.bfloat16 or torch.float32: export it unquantised"
        )
    return _converted(tensor, dtype, name, str(stored.file))


def _converted(tensor: torch.Tensor, dtype: torch.dtype, name: str, where: str) -> torch.Tensor:
    """Return a floating-point tensor in `dtype`; NaN, infinity and what overflows in `dtype` are refused."""
    if not _is_finite(tensor):
        raise ValueError(f"tensor {name!r} in {where!r} holds NaN or infinity: train or export the drafter again")
    converted = tensor.to(dtype)
    if converted is not tensor and not _is_finite(converted):
        raise ValueError(f"tensor {name!r} in {where!r} overflows in {dtype}: use torch.bfloat16 or torch.float32")
    return converted


def _is_finite(tensor: torch.Tensor) -> bool:
    # aminmax carries NaN through, and unlike isfinite on every element it allocates nothing
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _check_draft_vocabulary(drafter: ReDrafter, where: str) -> None:
    """Refuse maps between draft ids and target ids that contradict each other."""
    target_ids = drafter.target_ids()
    if target_ids is None:
        return
    assert drafter.t2d is not None
    marked = drafter.t2d.nonzero().flatten()
    if not torch.equal(marked, target_ids):
        raise ValueError(
            f"d2t and t2d in {where!r} contradict each other: d2t names {len(target_ids)} tokens, t2d {len(marked)}, "
            "and they are not the same ones in ascending order; set the draft vocabulary again"
        )


def _token_ids(path: Path) -> dict[str, int]:
    """Return the ids of all tokens of a `tokenizer.json`, the added ones included."""
    content = _read_json(path)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):
            # a Unigram tokenizer lists [token, score] pairs in the order of their ids
            vocabulary = {pair[0]: index for index, pair in enumerate(vocabulary)}
        return dict(vocabulary) | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    except (TypeError, KeyError, IndexError, ValueError):
        raise ValueError(f"{str(path)!r} does not list a tokenizer's tokens: export it again or remove it") from None
