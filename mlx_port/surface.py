"""Speed-ups over beam width and length, drawn as surfaces and heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

Grid = list[list[float]]
"""Mean speed-ups, a row per width and a column per length."""


def grid(rows: Sequence[Mapping[str, Any]], widths: Sequence[int], lengths: Sequence[int]) -> Grid:
    """Return the mean speed-up of every cell; NaN where a cell has no run."""
    return [
        [
            mean(cell) if cell else float("nan")
            for length in lengths
            for cell in [[row["speedup"] for row in rows if (row["beam_width"], row["beam_length"]) == (width, length)]]
        ]
        for width in widths
    ]


def draw(rows: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """Draw one surface and one heat map per type and sampling, into a PDF and a PNG, and return their paths.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        raise ValueError(
            f"the figures in {str(directory)!r} cannot be drawn without matplotlib: pip install 'vllm-redrafter[bench]'"
        ) from None
    widths = sorted({row["beam_width"] for row in rows})
    lengths = sorted({row["beam_length"] for row in rows})
    panels = sorted({(row["dtype"], row["greedy"]) for row in rows})
    figure = plt.figure(figsize=(9, 4 * len(panels)))
    for index, (dtype, greedy) in enumerate(panels):
        cells = grid([row for row in rows if (row["dtype"], row["greedy"]) == (dtype, greedy)], widths, lengths)
        title = f"{dtype}, {'greedy' if greedy else 'sampled'}: speed-up"
        _draw_surface(figure.add_subplot(len(panels), 2, 2 * index + 1, projection="3d"), cells, widths, lengths, title)
        _draw_heat_map(figure.add_subplot(len(panels), 2, 2 * index + 2), cells, widths, lengths, title)
    figure.tight_layout()
    files = [directory / "speedup.pdf", directory / "speedup.png"]
    for file in files:
        figure.savefig(file)
    plt.close(figure)
    return files


def _draw_surface(axes: Any, cells: Grid, widths: Sequence[int], lengths: Sequence[int], title: str) -> None:
    if len(widths) > 1 and len(lengths) > 1:
        columns, rows = np.meshgrid(lengths, widths)
        axes.plot_surface(columns, rows, np.array(cells), cmap="viridis")
    axes.set_xlabel("beam length")
    axes.set_ylabel("beam width")
    axes.set_title(title)


def _draw_heat_map(axes: Any, cells: Grid, widths: Sequence[int], lengths: Sequence[int], title: str) -> None:
    axes.imshow(cells, cmap="viridis", origin="lower", aspect="auto")
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white")
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(widths)), widths)
    axes.set_xlabel("beam length")
    axes.set_ylabel("beam width")
    axes.set_title(title)
