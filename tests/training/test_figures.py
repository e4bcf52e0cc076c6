"""An evaluation can be looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_redrafter.training.evaluation import Acceptance
from vllm_redrafter.training.figures import draw

pytest.importorskip("matplotlib")

ROWS = [
    Acceptance("all", 0.0, 4, 4, 2.1, [0.6, 0.4, 0.1]),
    Acceptance("all", 0.0, 4, 8, 2.6, [0.8, 0.5, 0.3]),
    Acceptance("all", 0.0, 1, 4, 1.9, [0.6, 0.2, 0.1]),
    Acceptance("code", 0.0, 4, 8, 3.3, [0.9, 0.8, 0.6]),
]


@pytest.mark.parametrize(("name", "beginning"), [("plot.svg", b"<?xml"), ("plot.png", b"\x89PNG")])
def test_the_ending_says_how_it_is_drawn(tmp_path: Path, name: str, beginning: bytes) -> None:
    draw(ROWS, tmp_path / name)

    assert (tmp_path / name).read_bytes().startswith(beginning)


def test_trees_and_chains_are_told_apart_and_sources_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[str, list[float]]] = []
    plot = Axes.plot

    def record(self: Axes, x: list[float], y: list[float], *arguments: str, label: str) -> object:
        drawn.append((label, list(y)))
        return plot(self, x, y, *arguments, label=label)

    monkeypatch.setattr(Axes, "plot", record)

    draw(ROWS, tmp_path / "plot.svg")

    assert ("tree, temperature 0", [2.1, 2.6]) in drawn
    assert ("chain, temperature 0", [1.9]) in drawn
    assert ("tree, temperature 0, 8 nodes", [0.8, 0.5, 0.3]) in drawn
    assert not any(3.3 in heights for _, heights in drawn)


def test_an_ending_that_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Format 'docx' is not supported"):
        draw(ROWS, tmp_path / "plot.docx")
