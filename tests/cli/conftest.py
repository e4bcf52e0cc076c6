from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_redrafter.cli import engine

FakePair = Callable[..., tuple[str, str]]


@pytest.fixture
def fake_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePair:
    """Makes a target and a drafter whose engine is `fake_engine_child.py`, behaving as the keywords say."""
    monkeypatch.setattr(
        engine, "CHILD_COMMAND", (sys.executable, str(Path(__file__).with_name("fake_engine_child.py")))
    )
    logs = tmp_path / "logs"
    logs.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(logs))

    def make(**behaviour: Any) -> tuple[str, str]:
        for name in ("target", "drafter"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / "target" / "fake.json").write_text(json.dumps(behaviour))
        return str(tmp_path / "target"), str(tmp_path / "drafter")

    return make


@pytest.fixture
def leftover_logs(tmp_path: Path) -> Callable[[], list[Path]]:
    """Returns the logs that engines left behind."""
    return lambda: list((tmp_path / "logs").iterdir())
