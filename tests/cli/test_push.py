from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_redrafter.cli.main import main
from vllm_redrafter.core import checkpoint
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.training import publish


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    config = ReDrafterConfig(hidden_size=4, vocab_size=12, verifier="org/target")
    checkpoint.save_drafter(ReDrafter(config), tmp_path)
    return tmp_path


def test_a_dry_run_prints_the_card_and_uploads_nothing(
    drafter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(publish, "push", lambda *arguments, **options: pytest.fail("uploaded"))

    assert main(["push", str(drafter), "user/drafter", "--dry-run"]) == 0

    assert capsys.readouterr().out == publish.card(drafter, "user/drafter") + "\n"


def test_the_options_reach_the_upload_and_the_commit_is_the_last_line(
    drafter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def push(*arguments: Any, **options: Any) -> str:
        calls.append((arguments, options))
        return "https://hub/user/drafter/commit/1"

    monkeypatch.setattr(publish, "push", push)

    status = main(["push", str(drafter), "user/drafter", "--private", "--revision", "v2", "--message", "Better"])

    assert status == 0
    assert calls == [((drafter, "user/drafter"), {"private": True, "revision": "v2", "message": "Better"})]
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"repository": "user/drafter", "commit": "https://hub/user/drafter/commit/1"}


@pytest.mark.parametrize(("target", "named"), [(None, "no target"), ("/models/target", "the target '/models/target'")])
def test_a_target_that_the_hubs_readers_do_not_have_is_noted(
    target: str | None,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint.save_drafter(ReDrafter(ReDrafterConfig(hidden_size=4, vocab_size=12, verifier=target)), tmp_path)
    monkeypatch.setattr(publish, "push", lambda *arguments, **options: "https://hub/user/drafter/commit/1")

    assert main(["push", str(tmp_path), "user/drafter"]) == 0

    assert capsys.readouterr().out.startswith(
        f"note: the config names {named}, so that the drafter cannot be served by"
    )


def test_what_goes_wrong_is_one_sentence_and_status_1(drafter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(drafter), "drafter"]) == 1

    error = capsys.readouterr().err
    assert error.startswith("vllm-redrafter push: 'drafter' is no name of a repository on the Hub")
    assert error.count("\n") == 1
