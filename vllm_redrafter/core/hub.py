"""Where files are: in a directory, or in a repository of the Hugging Face Hub that is fetched into its cache."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    # the base of what its HTTP library raises: which library that is depends on the version
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

_TOKENIZER_FILE = "tokenizer.json"
_FILES = ["config.json", _TOKENIZER_FILE, "*.safetensors", "*.safetensors.index.json"]
_ACCESS_DENIED = (401, 403)
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20


def resolve(model: str, revision: str | None = None) -> Path:
    """Return the local directory that holds the drafter.

    A directory is used as it is. Anything else is a Hub id, fetched with the user's own settings (token, `HF_HOME`,
    `HF_ENDPOINT`, `HF_HUB_OFFLINE`); of its files only JSON that we read and safetensors are downloaded. Every one of
    them is held against the digest that the Hub gave for it: its client checks no more than the size.

    Raises:
        ValueError: there is no such drafter, it cannot be reached, or a file of it is damaged.
    """
    path = Path(os.path.expanduser(model))
    if model and path.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision {revision!r} was given with the directory {model!r}: leave it out, only Hub ids have one"
            )
        return path
    if model and path.exists():
        raise ValueError(f"{model!r} is a file: pass the directory that holds it, with config.json beside it")
    try:
        directory = Path(snapshot_download(model, revision=revision, allow_patterns=_FILES))
    except HFValidationError:
        reason = f"no drafter at {model!r}: pass a directory with config.json or a Hub id"
    except GatedRepoError:
        reason = _denied(model)
    except RevisionNotFoundError:
        reason = f"{model!r} has no revision {revision!r} on {constants.ENDPOINT}: pass a branch, tag or commit of it"
    except RepositoryNotFoundError:
        reason = (
            f"no drafter at {model!r}: it is neither a directory here nor a repository that you can read on "
            f"{constants.ENDPOINT}; check the spelling, or log in with `hf auth login` if it is private"
        )
    except LocalEntryNotFoundError as error:
        reason = _not_cached(model, error.__cause__)
    except HfHubHTTPError as error:
        reason = _refused(model, error)
    except (HTTPError, OSError) as error:
        reason = _unreachable(model, error)
    else:
        _check_digests(model, directory)
        return directory
    raise ValueError(reason)


def find_tokenizer(model: str, revision: str | None = None, token: bool | str | None = None) -> Path | None:
    """Return the `tokenizer.json` of a directory or a Hub id, or None where it has none that can be read.

    Why a repository cannot be read is left to those who load the model.
    """
    if Path(model).is_dir():
        path = Path(model) / _TOKENIZER_FILE
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(model, _TOKENIZER_FILE, revision=revision, token=token))
    except (HFValidationError, HTTPError, OSError):
        return None


def is_hub_id(name: str) -> bool:
    """Return whether the Hub could have a repository of this name; nobody is asked."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _check_digests(model: str, directory: Path) -> None:
    """Refuse files of the Hub's cache that are not what their names say: a file's blob is named by its digest."""
    for file in sorted(directory.iterdir()):
        # without symbolic links the cache holds plain files, and no digest
        if not file.is_symlink():
            continue
        blob = Path(os.path.normpath(file.parent / file.readlink()))
        # what is not there is missed, by its name, where the drafter is loaded
        if _DIGEST.fullmatch(blob.name) and blob.is_file() and _digest(blob) != blob.name:
            raise ValueError(
                f"{file.name} of {model!r} is damaged: its digest is not the one that the Hub gave for it; "
                f"delete {str(blob)!r} and fetch it again"
            )


def _digest(blob: Path) -> str:
    """Return what the Hub would name the file: SHA-256 for large files, git's own digest for those kept in git."""
    if len(blob.name) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    with blob.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _not_cached(model: str, cause: BaseException | None) -> str:
    """Return why a repository that is not in the cache, or only in part, could not be fetched."""
    if isinstance(cause, OfflineModeIsEnabled):
        return (
            f"{model!r} is neither a directory nor a complete copy in the Hub cache {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE is set: unset it to download, or pass a directory"
        )
    if isinstance(cause, HfHubHTTPError):
        return _refused(model, cause)
    return _unreachable(model, cause)


def _refused(model: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status in _ACCESS_DENIED:
        return _denied(model)
    return f"{constants.ENDPOINT} answered {status} for {model!r}: try again later, or pass a directory"


def _denied(model: str) -> str:
    return (
        f"access to {model!r} on {constants.ENDPOINT} is restricted: "
        f"accept its terms at {constants.ENDPOINT}/{model} and log in with `hf auth login`"
    )


def _unreachable(model: str, error: BaseException | None) -> str:
    return (
        f"{model!r} is not a directory here, and it could not be fetched from {constants.ENDPOINT} "
        f"({type(error).__name__}: {error}): check the network and HF_ENDPOINT, or pass a directory"
    )
