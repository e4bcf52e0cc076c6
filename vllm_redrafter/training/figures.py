"""What an evaluation found, drawn: acceptance by depth, and tokens per step against the node budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_redrafter.training.evaluation import ALL, Acceptance


def draw(rows: Sequence[Acceptance], path: Path) -> None:
    """Write the figure; what format, the name's ending says.

    Raises:
        ValueError: the ending is none that can be drawn.
    """
    # of the extra `bench`; without pyplot, which looks for a display
    from matplotlib.figure import Figure

    everything = [row for row in rows if row.source == ALL]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for temperature in sorted({row.temperature for row in everything}):
        trees = [row for row in everything if row.temperature == temperature and row.beam_width > 1]
        chains = [row for row in everything if row.temperature == temperature and row.beam_width == 1]
        for kind, line, found in (("tree", "-", trees), ("chain", "--", chains)):
            if not found:
                continue
            label = f"{kind}, temperature {temperature:g}"
            right.plot(
                [row.num_nodes for row in found], [row.mean_acceptance_length for row in found], line + "o", label=label
            )
            largest = max(found, key=lambda row: row.num_nodes)
            depths = range(1, len(largest.by_depth) + 1)
            left.plot(depths, largest.by_depth, line + "o", label=f"{label}, {largest.num_nodes} nodes")
    left.set(xlabel="depth", ylabel="share of steps that accept it", ylim=(0, 1))
    right.set(xlabel="nodes verified per step", ylabel="tokens per step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
