"""A ledger of where time goes: sections within sections, as a context manager or a decorator.

MLX computes when it is asked for a result, so a section that ends before that measures nothing: give `timed` functions
that return arrays, which it evaluates, or evaluate at the end of a `section`. Both break up what MLX would have run as
one: measure to understand, not to compare.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass
class Section:
    """The runs of one name below one parent."""

    name: str
    num_runs: int = 0
    seconds: float = 0.0
    """Of all runs."""
    parts: dict[str, Section] = field(default_factory=dict)
    """Sections that ran inside."""


class Ledger:
    """Counts and times of nested sections; not for more than one thread."""

    def __init__(self) -> None:
        self._open = [Section("")]

    @property
    def sections(self) -> dict[str, Section]:
        """Sections that ran inside no other, by name."""
        return self._open[0].parts

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time what runs inside; a section that an exception leaves counts too."""
        section = self._open[-1].parts.setdefault(name, Section(name))
        self._open.append(section)
        start = time.perf_counter()
        try:
            yield
        finally:
            section.seconds += time.perf_counter() - start
            section.num_runs += 1
            self._open.pop()

    def timed(self, name: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
        """Return a decorator that times calls, the evaluation of the arrays that they return included."""

        def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
            @functools.wraps(function)
            def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
                with self.section(name):
                    result = function(*args, **kwargs)
                    mx.eval([leaf for _, leaf in tree_flatten([result]) if isinstance(leaf, mx.array)])
                return result

            return run

        return decorate

    def reset(self) -> None:
        """Forget all sections."""
        self._open[0].parts.clear()

    def table(self) -> str:
        """Return a line per section: milliseconds per run and in total, and the share of its parent's time."""
        rows = [("section", "latency per run (ms)", "latency in total (ms)", "share of parent (%)")]
        rows += self._rows(self._open[0], 0)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        )

    def _rows(self, parent: Section, depth: int) -> Iterator[tuple[str, str, str, str]]:
        for section in parent.parts.values():
            total = 1000 * section.seconds
            share = f"{100 * section.seconds / parent.seconds:.1f}" if parent.seconds else ""
            yield "  " * depth + section.name, f"{total / max(1, section.num_runs):.3f}", f"{total:.3f}", share
            yield from self._rows(section, depth + 1)
