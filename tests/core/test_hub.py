"""A drafter is found in a directory or on the Hub; the Hub's real client runs here against a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loopback_hub import CLIENT_CHUNK_BYTES, OLDER, TOKEN, WEIGHTS, grown, running_hub
from vllm_redrafter.core import hub


class Client:
    """Runs `hub.resolve` in a process of its own: the Hub's client reads its environment when it is imported."""

    def __init__(self, endpoint: str, home: Path, requests: list[str]) -> None:
        self.endpoint, self.home, self.requests = endpoint, home, requests

    def run(self, model: str, revision: str | None = None, **environment: str) -> dict[str, str]:
        program = (
            "import json, sys\n"
            "from vllm_redrafter.core import hub\n"
            "try:\n"
            "    print(json.dumps({'path': str(hub.resolve(*json.loads(sys.argv[1])))}))\n"
            "except ValueError as error:\n"
            "    print(json.dumps({'error': str(error)}))\n"
        )
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps([model, revision])],
            env=inherited | settings | environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        outcome: dict[str, str] = json.loads(done.stdout)
        return outcome

    def path(self, model: str, revision: str | None = None, **environment: str) -> Path:
        return Path(self.run(model, revision, **environment)["path"])

    def error(self, model: str, revision: str | None = None, **environment: str) -> str:
        return self.run(model, revision, **environment)["error"]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """A client with an empty cache, and its Hub."""
    with running_hub() as (endpoint, state):
        yield Client(endpoint, tmp_path / "home", state.requests)


def test_a_directory_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "drafter").mkdir()
    assert hub.resolve("~/drafter") == tmp_path / "drafter"


def test_a_directory_that_could_be_a_hub_id_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "drafter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/drafter") == Path("org/drafter")


def test_a_directory_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"revision 'v1' was given with the directory '.*': leave it out, only Hub ids"
    ):
        hub.resolve(str(tmp_path), "v1")


@pytest.mark.parametrize("name", ["model.safetensors", "drafter.bin"])
def test_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"'.*{name}' is a file: pass the directory that holds it"):
        hub.resolve(str(tmp_path / name))


@pytest.mark.parametrize(
    "model", ["./x", "/no/such/directory", "../x", "a/b/c", "drafters/", "", "my drafter", "~nobody/x"]
)
def test_what_is_neither_a_directory_nor_a_hub_id_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=f"^no drafter at '{model}': pass a directory with config.json or a Hub id$"):
        hub.resolve(model)


def test_a_hub_id_is_fetched_once_and_without_its_pickles_and_programs(client: Client) -> None:
    path = client.path("org/drafter")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        "config.json": b'{"draft_length": 4}',
        "model.safetensors": WEIGHTS,
    }
    assert path.is_relative_to(client.home)
    client.requests.clear()
    assert client.path("org/drafter") == path
    assert not [request for request in client.requests if "/resolve/" in request]


@pytest.mark.parametrize("revision", ["v1", OLDER])
def test_a_revision_is_a_branch_a_tag_or_a_commit(client: Client, revision: str) -> None:
    assert (client.path("org/drafter", revision) / "model.safetensors").read_bytes() == b"old weights"


def test_an_unknown_revision_is_refused(client: Client) -> None:
    assert client.error("org/drafter", "v9") == (
        f"'org/drafter' has no revision 'v9' on {client.endpoint}: pass a branch, tag or commit of it"
    )


@pytest.mark.parametrize("model", ["org/missing", "org/private", "my-drafter"])
def test_a_repository_that_cannot_be_read_is_refused(client: Client, model: str) -> None:
    assert client.error(model) == (
        f"no drafter at '{model}': it is neither a directory here nor a repository that you can read on "
        f"{client.endpoint}; check the spelling, or log in with `hf auth login` if it is private"
    )


@pytest.mark.parametrize("model", ["org/gated", "org/forbidden", "org/expired"])
def test_a_gated_repository_says_how_to_get_in(client: Client, model: str) -> None:
    assert client.error(model) == (
        f"access to '{model}' on {client.endpoint} is restricted: accept its terms at {client.endpoint}/{model} "
        "and log in with `hf auth login`"
    )


@pytest.mark.parametrize("model", ["org/gated", "org/private"])
def test_the_users_token_opens_what_it_may(client: Client, model: str) -> None:
    assert (client.path(model, HF_TOKEN=TOKEN) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_hub_that_answers_with_an_error_is_named_with_its_status(client: Client) -> None:
    assert client.error("org/broken") == (
        f"{client.endpoint} answered 418 for 'org/broken': try again later, or pass a directory"
    )


def test_a_connection_that_breaks_in_the_middle_is_reported(client: Client) -> None:
    message = client.error("org/cut")
    assert message.startswith("'org/cut' is not a directory here, and it could not be fetched from ")


def test_offline_takes_the_cached_copy_and_asks_nobody(client: Client) -> None:
    path = client.path("org/drafter")
    client.requests.clear()
    assert client.path("org/drafter", HF_HUB_OFFLINE="1") == path
    assert client.requests == []


def test_offline_without_a_cached_copy_is_refused(client: Client) -> None:
    assert client.error("org/drafter", HF_HUB_OFFLINE="1") == (
        f"'org/drafter' is neither a directory nor a complete copy in the Hub cache {client.home}/hub, and "
        "HF_HUB_OFFLINE is set: unset it to download, or pass a directory"
    )
    assert client.requests == []


def test_a_hub_that_refuses_connections_is_named(client: Client) -> None:
    message = client.error("org/drafter", HF_ENDPOINT="http://127.0.0.1:9")
    assert message.startswith(
        "'org/drafter' is not a directory here, and it could not be fetched from http://127.0.0.1:9 (ConnectError: "
    )
    assert message.endswith("): check the network and HF_ENDPOINT, or pass a directory")


def test_a_cached_copy_serves_while_the_hub_refuses_connections(client: Client) -> None:
    path = client.path("org/drafter")
    assert client.path("org/drafter", HF_ENDPOINT="http://127.0.0.1:9") == path


def test_a_download_that_is_cut_in_the_middle_goes_on_where_it_stopped(client: Client) -> None:
    content = (client.path("org/breaking") / "model.safetensors").read_bytes()

    assert content == grown("model.safetensors", WEIGHTS)
    assert f"model.safetensors from byte {CLIENT_CHUNK_BYTES}" in client.requests


def test_a_file_that_is_not_what_its_digest_says_is_refused_also_from_the_cache(client: Client) -> None:
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        message = client.error("org/damaged", **environment)
        assert message.startswith(
            "config.json of 'org/damaged' is damaged: its digest is not the one that the Hub gave for it; delete "
        )
        assert message.endswith(" and fetch it again")


def test_a_file_that_is_damaged_in_the_cache_is_fetched_again_once_it_is_deleted(client: Client) -> None:
    weights = client.path("org/drafter") / "model.safetensors"
    blob = weights.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")

    message = client.error("org/drafter")
    assert message.startswith("model.safetensors of 'org/drafter' is damaged")
    assert str(blob) in message
    blob.unlink()

    assert (client.path("org/drafter") / "model.safetensors").read_bytes() == WEIGHTS
