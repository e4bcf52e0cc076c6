"""Where a drafter's files are: a directory, or a repository of the Hugging Face Hub that is fetched into its cache."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import constants, snapshot_download
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

_FILES = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
_ACCESS_DENIED = (401, 403)


def resolve(model: str, revision: str | None = None) -> Path:
    """Return the local directory that holds the drafter.

    A directory is used as it is. Anything else is a Hub id, fetched with the user's own settings (token, `HF_HOME`,
    `HF_ENDPOINT`, `HF_HUB_OFFLINE`); of its files only JSON that we read and safetensors are downloaded.

    Raises:
        ValueError: there is no such drafter, or it cannot be reached.
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
        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES))
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
    raise ValueError(reason)


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
