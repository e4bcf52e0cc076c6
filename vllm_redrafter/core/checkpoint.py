"""Drafters on disk: a directory with `config.json` and safetensors; pickles are never read.

`load_drafter` reads every dialect of `formats`, `save_drafter` writes ours and `save_as_apple` Apple's. Whatever does
not fit is refused here, with the tensor's or the field's name, before anything is built on it or written.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vllm_redrafter.core import apple, formats, hub, weights
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

CONFIG_FILE = "config.json"


def load_config(directory: Path) -> ReDrafterConfig:
    """Return the configuration of the drafter in `directory`, whatever dialect it is written in.

    Raises:
        ValueError: there is no readable `config.json`, or it does not describe a usable drafter.
    """
    return formats.parse_config(load_fields(directory), str(directory))


def load_fields(directory: Path) -> dict[str, object]:
    """Return what `config.json` of `directory` holds, as it stands there.

    Raises:
        ValueError: it is not there or no JSON object.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"no {CONFIG_FILE} in {str(directory)!r}: pass a directory that holds a drafter")
    return weights.read_json(path)


def load_drafter(
    model: str | Path, revision: str | None = None, dtype: torch.dtype | None = torch.float32
) -> ReDrafter:
    """Return the drafter of a directory or Hub id on the CPU, ready for inference: eval mode, no gradients.

    Args:
        dtype: of its weights; None keeps the stored ones, bit for bit.

    Raises:
        ValueError: it cannot be found, or its config or its tensors are not those of a drafter.
    """
    directory = hub.resolve(str(model), revision)
    config = load_config(directory)
    # on the meta device nothing is allocated: the tensors read below become the parameters
    with torch.device("meta"):
        drafter = ReDrafter(config)
    expected = {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}
    stored = weights.catalogue(directory)
    weights.check_shapes(expected, stored, directory)
    state = {name: weights.read(stored[name], name, dtype) for name in expected}
    drafter.load_state_dict(state, assign=True)
    _check_draft_vocabulary(drafter, str(directory))
    return drafter.requires_grad_(False).eval()


def save_drafter(
    drafter: ReDrafter,
    directory: Path,
    dtype: torch.dtype | None = None,
    unused: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write `config.json` and `model.safetensors`, each appearing whole or not at all.

    Args:
        dtype: floating-point type on disk; None keeps the drafter's own.
        unused: tensors that no forward pass uses, stored along (`weights.read_unused`).

    Raises:
        ValueError: the drafter could not be loaded back (bad field, NaN or infinity, unset draft vocabulary), or the
            directory cannot be written.
    """
    formats.parse_config(drafter.config.to_dict(), str(directory))
    state = _state(drafter, dtype, unused, str(directory))
    config = copy.deepcopy(drafter.config)
    config.architectures = [type(drafter).__name__]
    config.dtype = _stored_dtype(state)
    _write(directory, config.to_json_string(), state)


def save_as_apple(
    drafter: ReDrafter,
    directory: Path,
    dtype: torch.dtype | None = None,
    unused: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the drafter as Apple's programs, in PyTorch and in MLX, read it; arguments as those of `save_drafter`.

    Raises:
        ValueError: Apple's format cannot hold this drafter, or for the reasons of `save_drafter`.
    """
    fields = apple.write_fields(drafter.config, str(directory))
    state = _state(drafter, dtype, unused, str(directory))
    fields["torch_dtype"] = str(_stored_dtype(state)).removeprefix("torch.")
    _write(directory, json.dumps(fields, indent=2, sort_keys=True) + "\n", state)


def check_against_target(
    config: ReDrafterConfig, *, hidden_size: int, vocab_size: int, num_layers: int, target: str
) -> None:
    """Refuse a drafter whose sizes are not those of the target, or that sees layers which the target lacks.

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
    if config.fused_layers and config.fused_layers[-1] >= num_layers:
        differences.append(f"fused_layers {config.fused_layers} where the target has {num_layers} layers")
    if differences:
        origin = f" (trained for {config.verifier!r})" if config.verifier else ""
        raise ValueError(
            f"the drafter{origin} does not fit the target {target!r}: it has {' and '.join(differences)}; "
            "pass a drafter that was trained for this target"
        )


def check_tokenizer(
    drafter_directory: Path, target: str, revision: str | None = None, token: bool | str | None = None
) -> None:
    """Refuse a drafter that carries another tokenizer than the target; does nothing where either carries none.

    Args:
        target: a directory or a Hub id, which has a `revision` and may need a `token`.

    Raises:
        ValueError: the two `tokenizer.json` give different ids, or one of them is no list of tokens.
    """
    our_file = hub.find_tokenizer(str(drafter_directory))
    their_file = hub.find_tokenizer(target, revision, token) if our_file else None
    if our_file is None or their_file is None:
        return
    ours, theirs = _token_ids(our_file), _token_ids(their_file)
    different = sorted(each for each in ours.keys() | theirs.keys() if ours.get(each) != theirs.get(each))
    if different:
        example = different[0]
        raise ValueError(
            f"the drafter's tokenizer is not the target's: {len(different)} tokens have one id in {str(our_file)!r} "
            f"and another in {str(their_file)!r} ({example!r}: {ours.get(example)} and {theirs.get(example)}); "
            "pass a drafter that was trained for this target"
        )


def _state(
    drafter: ReDrafter, dtype: torch.dtype | None, unused: Mapping[str, torch.Tensor] | None, where: str
) -> dict[str, torch.Tensor]:
    """Return the tensors as they are stored."""
    _check_draft_vocabulary(drafter, where)
    state: dict[str, torch.Tensor] = dict(unused or {})
    for name, tensor in drafter.state_dict().items():
        if tensor.is_floating_point():
            tensor = weights.converted(tensor, dtype or tensor.dtype, name, where)
        state[name] = tensor.cpu().contiguous()
    return state


def _stored_dtype(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    return next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())


def _write(directory: Path, config: str, state: dict[str, torch.Tensor]) -> None:
    where = str(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"a drafter cannot be saved to {where!r}: it is a file, pass a directory")
    config_part = directory / f".{CONFIG_FILE}.{os.getpid()}.part"
    weights_part = directory / f".{weights.WEIGHTS_FILE}.{os.getpid()}.part"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            config_part.write_text(config, encoding="utf-8")
            save_file(state, weights_part, metadata={"format": "pt"})
            os.replace(weights_part, directory / weights.WEIGHTS_FILE)
            os.replace(config_part, directory / CONFIG_FILE)
        finally:
            config_part.unlink(missing_ok=True)
            weights_part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"a drafter cannot be saved to {where!r} ({reason}): make room or give write access there, "
            "or pass another directory"
        ) from None


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
    content = weights.read_json(path)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):
            # a Unigram tokenizer lists [token, score] pairs in the order of their ids
            vocabulary = {pair[0]: index for index, pair in enumerate(vocabulary)}
        return dict(vocabulary) | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    except (TypeError, KeyError, IndexError, ValueError):
        raise ValueError(f"{str(path)!r} does not list a tokenizer's tokens: export it again or remove it") from None
