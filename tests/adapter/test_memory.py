"""What memory is left, by the machine and by a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_redrafter.adapter import memory


def test_a_container_has_no_more_memory_than_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CONTAINER_LIMIT", limit)
    machine = memory.available_bytes()
    limit.write_text("max\n")
    unlimited = memory.available_bytes()
    limit.write_text("4096\n")

    assert memory.available_bytes() == 4096
    assert min(machine, unlimited) > 1 << 26
