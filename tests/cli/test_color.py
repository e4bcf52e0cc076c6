from __future__ import annotations

import sys

import pytest

from vllm_redrafter.cli import color


@pytest.mark.parametrize(
    ("choice", "terminal", "no_color", "coloured"),
    [
        ("auto", True, "", True),
        ("auto", True, "1", False),
        ("auto", False, "", False),
        ("always", False, "1", True),
        ("never", True, "", False),
    ],
)
def test_colours_are_for_terminals_unless_told_otherwise(
    choice: str, terminal: bool, no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)

    style = color.select(choice)

    assert (style.paint("x", style.drafted) != "x") == coloured
