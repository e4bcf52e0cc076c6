from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_redrafter.cli import engine
from vllm_redrafter.core.checkpoint import save_drafter
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

FakePair = Callable[..., tuple[str, str]]

SIZES = {"hidden_size": 8, "vocab_size": 16}


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
        target, drafter = tmp_path / "target", tmp_path / "drafter"
        target.mkdir()
        (target / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 2, **SIZES}))
        (target / "fake.json").write_text(json.dumps(behaviour))
        save_drafter(ReDrafter(ReDrafterConfig(**SIZES, exit_dim=16)), drafter)
        return str(target), str(drafter)

    return make


@pytest.fixture
def leftover_logs(tmp_path: Path) -> Callable[[], list[Path]]:
    """Returns the logs that engines left behind."""
    return lambda: list((tmp_path / "logs").iterdir())
