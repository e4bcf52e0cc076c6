"""Uploads run the Hub's real client against a server on loopback, and what was uploaded is fetched back from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download

from tests.loopback_hub import MAIN, READ_ONLY_TOKEN, TOKEN, Hub, running_hub, talk_to
from vllm_redrafter.core import checkpoint
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.training import publish


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    """A drafter of our own with its records."""
    config = ReDrafterConfig(hidden_size=4, vocab_size=12, verifier="org/target")
    checkpoint.save_drafter(ReDrafter(config), tmp_path / "drafter")
    (tmp_path / "drafter" / "provenance.json").write_text('{"licence": "apache-2.0"}')
    (tmp_path / "drafter" / "notes.txt").write_text("mine")
    return tmp_path / "drafter"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A Hub on loopback that the client of this process talks to, as a user whose token may write."""
    with running_hub() as (endpoint, state):
        talk_to(endpoint, tmp_path, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield state


def error(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        publish.push(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_uploaded_is_fetched_back_bit_for_bit(drafter: Path, hub: type[Hub]) -> None:
    url = publish.push(drafter, "user/drafter")

    fetched = Path(snapshot_download("user/drafter"))
    names = ["README.md", "config.json", "model.safetensors", "provenance.json"]
    assert sorted(path.name for path in fetched.iterdir()) == names
    for name in names[1:]:
        assert (fetched / name).read_bytes() == (drafter / name).read_bytes()
    assert (fetched / "README.md").read_text() == publish.card(drafter, "user/drafter")
    assert "license: apache-2.0" in (fetched / "README.md").read_text()
    assert url == f"{constants.ENDPOINT}/user/drafter/commit/{hub.branches['user/drafter']['main']}"
    assert not (drafter / "README.md").exists()
    assert checkpoint.load_drafter("user/drafter").config.verifier == "org/target"


def test_a_second_upload_is_a_second_commit_of_the_same_repository(drafter: Path, hub: type[Hub]) -> None:
    first = publish.push(drafter, "user/drafter")
    (drafter / "provenance.json").write_text('{"licence": "mit"}')

    second = publish.push(drafter, "user/drafter", message="Corrected licence")

    assert first != second
    assert second.endswith(hub.branches["user/drafter"]["main"])


def test_a_revision_is_a_branch_of_its_own(drafter: Path, hub: type[Hub]) -> None:
    url = publish.push(drafter, "user/drafter", revision="v2")

    branches = hub.branches["user/drafter"]
    assert branches["main"] == MAIN
    assert url.endswith(branches["v2"])


def test_a_card_that_somebody_wrote_is_uploaded_as_it_is(drafter: Path, hub: type[Hub]) -> None:
    (drafter / "README.md").write_text("My own words.\n")

    publish.push(drafter, "user/drafter")

    assert hub.commits[hub.branches["user/drafter"]["main"]]["README.md"] == b"My own words.\n"


def test_an_upload_that_is_cut_in_the_middle_is_repeated(drafter: Path, hub: type[Hub]) -> None:
    publish.push(drafter, "user/cut")

    assert len(hub.is_cut) == 1
    commit = hub.commits[hub.branches["user/cut"]["main"]]
    assert commit["model.safetensors"] == (drafter / "model.safetensors").read_bytes()


def test_without_a_token_nobody_is_asked(drafter: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")

    assert error(drafter, "user/drafter") == (
        "there is no token to upload to 'user/drafter' with: log in with `hf auth login` or set HF_TOKEN, "
        "with a token that may write"
    )
    assert hub.requests == []


def test_a_token_that_the_hub_does_not_know_is_refused(
    drafter: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")

    assert "does not know the token that 'user/drafter' was to be uploaded with: log in" in error(
        drafter, "user/drafter"
    )


@pytest.mark.parametrize(("token", "repository"), [(READ_ONLY_TOKEN, "user/drafter"), (TOKEN, "stranger/drafter")])
def test_a_token_that_may_not_write_there_is_refused(
    drafter: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, token: str, repository: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)

    assert error(drafter, repository) == (
        f"the token in use may not write to '{repository}' on {constants.ENDPOINT}: check the user or organisation, "
        "and use a token with write access"
    )


def test_a_card_that_the_hub_does_not_take_is_reported_before_anything_is_sent(drafter: Path, hub: type[Hub]) -> None:
    (drafter / "README.md").write_text("---\nlicense: forbidden\n---\n")

    message = error(drafter, "user/drafter")

    assert '"license" must be one of a list' in message
    assert message.endswith(": correct README.md")
    assert not hub.large_files


def test_offline_is_said(drafter: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert error(drafter, "user/drafter") == (
        "'user/drafter' cannot be uploaded while HF_HUB_OFFLINE is set: unset it first"
    )
    assert hub.requests == []


def test_a_hub_that_is_not_there_is_named(drafter: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    message = error(drafter, "user/drafter")

    assert message.startswith("'user/drafter' could not be uploaded to http://127.0.0.1:9 (ConnectError: ")
    assert message.endswith("): check the network and HF_ENDPOINT, and repeat the command")


@pytest.mark.parametrize("repository", ["drafter", "a/b/c", "user/na--me", "user/my drafter", "", "user/", "./drafter"])
def test_what_is_no_name_of_a_repository_is_refused_first(drafter: Path, hub: type[Hub], repository: str) -> None:
    assert error(drafter, repository).startswith(
        f"{repository!r} is no name of a repository on the Hub: write USER/NAME"
    )
    assert hub.requests == []


def test_what_is_no_drafter_of_ours_is_not_uploaded(drafter: Path, hub: type[Hub], tmp_path: Path) -> None:
    assert error(tmp_path / "absent", "user/drafter").startswith(f"no directory '{tmp_path / 'absent'}': pass")
    (drafter / "model.safetensors").write_bytes(b"damaged")
    assert "is not a readable safetensors file" in error(drafter, "user/drafter")
    (drafter / "config.json").write_text('{"model_type": "recurrent_drafting_drafter"}')
    assert "is in Apple's format: make it ours first, with `vllm-redrafter convert --from apple" in error(
        drafter, "user/drafter"
    )
    assert hub.requests == []
