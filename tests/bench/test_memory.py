"""Whether several engines can be up at once, by what memory there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_redrafter.bench import memory

GIB = 2**30


@pytest.fixture
def target(tmp_path: Path) -> str:
    """A target whose weights take a GiB, twice that in 32 bits, and packed as much again."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(GIB)
    return str(tmp_path)


@pytest.mark.parametrize(("num_engines", "available"), [(1, 6.5), (2, 13.0)])
def test_engines_fit_where_there_is_room_for_each_with_its_weights(
    num_engines: int, available: float, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gib, fits in ((available, True), (available - 0.1, False)):
        monkeypatch.setattr(memory, "available_bytes", lambda gib=gib: gib * GIB)
        assert memory.engines_fit([target] * num_engines) is fits


def test_a_gpu_holds_one_engine_whatever_the_host_has(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000 * GIB)
    monkeypatch.setattr(memory, "has_gpu", lambda: True)

    assert memory.engines_fit([target])
    assert not memory.engines_fit([target, target])
