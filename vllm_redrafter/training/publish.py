"""To the Hugging Face Hub: a drafter and its model card, in one commit."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
)

from vllm_redrafter.core import checkpoint, formats, hub
from vllm_redrafter.core.conversion import COMPANIONS
from vllm_redrafter.training import model_card

CARD_FILE = "README.md"
_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS)


def card(directory: str | Path, repository: str) -> str:
    """Return the model card that `push` uploads: the `README.md` in `directory`, or one made from what stands there.

    Raises:
        ValueError: `directory` holds no drafter in our format, or `repository` is no name of one on the Hub.
    """
    directory = Path(directory)
    _check_repository(repository)
    if not directory.is_dir():
        raise ValueError(f"no directory {str(directory)!r}: pass the directory of the drafter to upload")
    dialect = formats.dialect_of(checkpoint.load_fields(directory))
    if dialect not in ("redrafter", None):
        raise ValueError(
            f"{str(directory)!r} is in {formats.DIALECTS[dialect]} format: make it ours first, with "
            f"`vllm-redrafter convert --from {dialect} {directory} D`, and push D"
        )
    # what could not be loaded is not uploaded
    drafter = checkpoint.load_drafter(directory, dtype=None)
    if (directory / CARD_FILE).is_file():
        return (directory / CARD_FILE).read_text(encoding="utf-8")
    num_parameters = sum(parameter.numel() for parameter in drafter.parameters())
    return model_card.render(directory, repository, drafter.config, num_parameters)


def push(
    directory: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload drafter",
) -> str:
    """Upload the drafter in `directory`, with its model card, and return the address of the commit.

    The user's own settings count: token, `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`.

    Args:
        repository: `user/name`; made unless it is there.
        private: whether a new repository is private.
        revision: the branch; made unless it is there. None for the main one.
        message: of the commit.

    Raises:
        ValueError: there is nothing to upload, or the Hub cannot be reached or refuses; one sentence says why.
    """
    directory = Path(directory)
    content = card(directory, repository)
    if get_token() is None:
        raise ValueError(
            f"there is no token to upload to {repository!r} with: log in with `hf auth login` or set HF_TOKEN, "
            "with a token that may write"
        )
    files = sorted({path for pattern in _PATTERNS for path in directory.glob(pattern)})
    operations = [CommitOperationAdd(path.name, str(path)) for path in files]
    operations.append(CommitOperationAdd(CARD_FILE, content.encode()))
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message=message, revision=revision)
    except OfflineModeIsEnabled:
        reason = f"{repository!r} cannot be uploaded while HF_HUB_OFFLINE is set: unset it first"
    except HfHubHTTPError as error:
        reason = _refused(repository, error)
    except (HTTPError, OSError) as error:
        reason = _unreachable(repository, error)
    except RuntimeError as error:
        # how the client reports a large file that it could not send; what happened is its cause
        cause = error.__cause__ or error
        reason = _refused(repository, cause) if isinstance(cause, HfHubHTTPError) else _unreachable(repository, cause)
    except ValueError as error:
        reason = f"{constants.ENDPOINT} does not take {repository!r} as it is ({_one_line(error)}): correct {CARD_FILE}"
    else:
        return commit.commit_url
    raise ValueError(reason)


def _check_repository(repository: str) -> None:
    if not hub.is_hub_id(repository) or "/" not in repository:
        raise ValueError(
            f"{repository!r} is no name of a repository on the Hub: "
            "write USER/NAME, of letters, digits and single '-', '_' or '.'"
        )


def _refused(repository: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return (
            f"{constants.ENDPOINT} does not know the token that {repository!r} was to be uploaded with: "
            "log in again with `hf auth login`, or correct HF_TOKEN"
        )
    if status == 403:
        return (
            f"the token in use may not write to {repository!r} on {constants.ENDPOINT}: check the user or "
            "organisation, and use a token with write access"
        )
    detail = f" ({_one_line(error.server_message)})" if error.server_message else ""
    return f"{constants.ENDPOINT} answered {status} for {repository!r}{detail}: try again later"


def _unreachable(repository: str, error: BaseException) -> str:
    return (
        f"{repository!r} could not be uploaded to {constants.ENDPOINT} ({type(error).__name__}: {_one_line(error)}): "
        "check the network and HF_ENDPOINT, and repeat the command"
    )


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
