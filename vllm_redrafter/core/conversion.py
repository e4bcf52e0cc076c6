"""From one dialect to another: other programs' drafters become ours, and ours Apple's; tensors stay bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

from vllm_redrafter.core import checkpoint, formats, hub, weights
from vllm_redrafter.core.drafter import ReDrafter

TARGET_FORMATS = ("redrafter", "apple")
COMPANIONS = ("tokenizer.json", "provenance.json", "evaluation.json")
"""Files beside a checkpoint that are not part of any dialect; they come along."""


def convert(
    source: str | Path,
    directory: str | Path,
    *,
    source_format: str = "redrafter",
    target_format: str = "redrafter",
    verifier: str | None = None,
    overwrite: bool = False,
) -> ReDrafter:
    """Write the drafter of `source`, a directory or Hub id, to `directory` in another format, and return it.

    Args:
        source_format: the dialect that `source` must be written in, one of `formats.DIALECTS`.
        target_format: one of `TARGET_FORMATS`.
        verifier: name or path of the target, for the config; None keeps what the source says.
        overwrite: whether a drafter that stands in `directory` is replaced.

    Raises:
        ValueError: a format is unknown or not the source's, the source is no usable drafter, the format wanted cannot
            hold it, or `directory` is taken or cannot be written.
    """
    directory = Path(directory)
    _check_name(source_format, tuple(formats.DIALECTS))
    _check_name(target_format, TARGET_FORMATS)
    origin = hub.resolve(str(source))
    _check_directory(directory, origin, overwrite)
    _check_dialect(origin, source_format)
    drafter = checkpoint.load_drafter(origin, dtype=None)
    unused = weights.read_unused(origin)
    # some configs announce a tensor that was never stored, and some store one that they do not announce
    drafter.config.emb_norm = bool(unused)
    if verifier is not None:
        _set_verifier(drafter, verifier)

    save = checkpoint.save_as_apple if target_format == "apple" else checkpoint.save_drafter
    save(drafter, directory, unused=unused)
    _copy_companions(origin, directory)
    return drafter


def _check_name(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"there is no format {name!r}: choose from {', '.join(known)}")


def _check_directory(directory: Path, origin: Path, overwrite: bool) -> None:
    where = str(directory)
    if directory.is_dir() and directory.resolve() == origin.resolve():
        raise ValueError(f"{where!r} is the drafter that is to be converted: pass another directory for the result")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise ValueError(f"{where!r} is there and not empty: pass another directory, or --overwrite to replace it")


def _check_dialect(origin: Path, wanted: str) -> None:
    found = formats.dialect_of(checkpoint.load_fields(origin))
    # TensorRT-LLM's checkpoints may keep Apple's config and differ in the names of their tensors only
    if wanted == "trtllm" and found == "apple" and _has_older_names(origin):
        return
    # what is no drafter at all is refused, in more detail, where it is loaded
    if found is not None and found != wanted:
        raise ValueError(
            f"{str(origin)!r} is not in {formats.DIALECTS[wanted]} format but in {formats.DIALECTS[found]}: "
            f"pass --from {found}"
        )


def _has_older_names(origin: Path) -> bool:
    return any(stored.name != name for name, stored in weights.catalogue(origin).items())


def _copy_companions(origin: Path, directory: Path) -> None:
    for name in COMPANIONS:
        if (origin / name).is_file():
            try:
                shutil.copyfile(origin / name, directory / name)
            except OSError as error:
                raise ValueError(
                    f"{name} cannot be copied to {str(directory)!r} ({error.strerror}): make room or give write "
                    "access there, or pass another directory"
                ) from None


def _set_verifier(drafter: ReDrafter, verifier: str) -> None:
    """Record the target; a directory is recorded by its absolute path, with its architectures."""
    directory = Path(verifier)
    if directory.is_dir():
        fields = weights.read_json(directory / checkpoint.CONFIG_FILE)
        drafter.config.verifier = str(directory.resolve())
        drafter.config.verifier_architectures = list(fields.get("architectures") or [])
    else:
        drafter.config.verifier = verifier
