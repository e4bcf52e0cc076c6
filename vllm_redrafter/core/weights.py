"""The tensors of a drafter's directory: safetensors, whole or in shards, under whatever names they are stored.

Nothing is read until its name and shape are known to fit; pickles are never read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from vllm_redrafter.core import formats

WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_NAMED = 5


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, not yet read."""

    file: Path
    name: str
    shape: tuple[int, ...]


def catalogue(directory: Path) -> dict[str, StoredTensor]:
    """Return what the directory holds under the drafter's own names, without what no forward pass uses.

    Raises:
        ValueError: there are no safetensors, or they cannot be read, or a tensor is there twice.
    """
    stored: dict[str, StoredTensor] = {}
    for tensor in _list(directory):
        name = formats.tensor_name(tensor.name)
        if name is None:
            continue
        if name in stored:
            other = stored[name]
            raise ValueError(
                f"tensor {name!r} is there twice, as {other.name!r} in {str(other.file)!r} and as {tensor.name!r} "
                f"in {tensor.file.name!r}: remove one"
            )
        stored[name] = tensor
    return stored


def check_shapes(expected: dict[str, tuple[int, ...]], stored: dict[str, StoredTensor], directory: Path) -> None:
    """Refuse tensors that are not those expected.

    Raises:
        ValueError: naming what is missing, not expected, and of another shape.
    """
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
            f"the tensors in {str(directory)!r} are not those that its config.json describes; {'; '.join(faults)}. "
            "Correct the config, or export the drafter again"
        )


def read(stored: StoredTensor, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    """Return the tensor that the drafter calls `name`; weights come in `dtype`, None keeps the stored one.

    Raises:
        ValueError: it is of a type that no drafter has, or holds what `dtype` cannot.
    """
    tensor = _content(stored)
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
    return converted(tensor, dtype or tensor.dtype, name, str(stored.file))


def read_unused(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that no forward pass uses and that only travel along, under their stored names."""
    return {stored.name: _content(stored) for stored in _list(directory) if formats.tensor_name(stored.name) is None}


def converted(tensor: torch.Tensor, dtype: torch.dtype, name: str, where: str) -> torch.Tensor:
    """Return a floating-point tensor in `dtype`.

    Raises:
        ValueError: it holds NaN or infinity, or overflows in `dtype`.
    """
    if not _is_finite(tensor):
        raise ValueError(f"tensor {name!r} in {where!r} holds NaN or infinity: train or export the drafter again")
    result = tensor.to(dtype)
    if result is not tensor and not _is_finite(result):
        raise ValueError(f"tensor {name!r} in {where!r} overflows in {dtype}: use torch.bfloat16 or torch.float32")
    return result


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ValueError: it holds something else, or is not JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}): download or export it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}, but it must be a JSON object")
    return content


def _list(directory: Path) -> list[StoredTensor]:
    """Return the tensors of all safetensors files; none is read."""
    tensors = []
    for file in _weight_files(directory):
        try:
            with safe_open(file, framework="pt") as content:
                names = content.keys()
                tensors += [StoredTensor(file, name, tuple(content.get_slice(name).get_shape())) for name in names]
        except SafetensorError as error:
            raise ValueError(
                f"{str(file)!r} is not a readable safetensors file ({error}): "
                "it is damaged or cut short (or a git-lfs pointer), download it again"
            ) from None
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    index = directory / _INDEX_FILE
    if index.is_file():
        return _shards(index)
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if not pickles:
        raise ValueError(
            f"no {WEIGHTS_FILE} in {str(directory)!r}: pass a drafter that has its weights as safetensors "
            "(pickles are neither fetched nor loaded)"
        )
    raise ValueError(
        f"{str(directory)!r} holds pickled weights only ({', '.join(pickles)}), never loaded because they can run "
        "code: convert to safetensors, with "
        f'`safetensors.torch.save_file(torch.load("{pickles[0]}", weights_only=True), "{WEIGHTS_FILE}")`'
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{str(index)!r} has no weight_map of tensor names to file names: export the drafter again")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if file.parent != index.parent:
            raise ValueError(f"{str(index)!r} names {str(file)!r}, which is not beside it: export the drafter again")
        if not file.is_file():
            raise ValueError(f"{str(index)!r} names {file.name!r}, which is not there: download the drafter again")
    return files


def _content(stored: StoredTensor) -> torch.Tensor:
    with safe_open(stored.file, framework="pt") as content:
        tensor: torch.Tensor = content.get_tensor(stored.name)
    return tensor


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _is_finite(tensor: torch.Tensor) -> bool:
    # aminmax carries NaN through, and unlike isfinite on every element it allocates nothing
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
