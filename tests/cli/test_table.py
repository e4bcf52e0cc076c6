from __future__ import annotations

from vllm_redrafter.cli.table import number, render


def test_columns_are_as_wide_as_their_widest_cell_and_figures_flush_right() -> None:
    assert render(("name", "n"), [("a", "1"), ("longer", "1000")]).splitlines() == [
        "name       n",
        "a          1",
        "longer  1000",
    ]


def test_what_has_no_figure_is_a_dash() -> None:
    assert [number(None), number(1.0), number(1.234, 1, "x")] == ["–", "1.00", "1.2x"]
