from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_port import timing
from mlx_port.timing import Ledger


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Returns a ledger whose clock goes one second further at every look."""
    seconds = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(seconds)))
    return Ledger()


def test_sections_nest_and_add_up(ledger: Ledger) -> None:
    for _ in range(2):
        with ledger.section("step"):
            with ledger.section("verify"):
                pass
            with ledger.section("draft"), ledger.section("verify"):
                pass

    assert ledger.table().splitlines() == [
        "section     latency per run (ms)  latency in total (ms)  share of parent (%)",
        "step                    7000.000              14000.000                     ",
        "  verify                1000.000               2000.000                 14.3",
        "  draft                 3000.000               6000.000                 42.9",
        "    verify              1000.000               2000.000                 33.3",
    ]


def test_a_section_that_fails_counts_and_closes(ledger: Ledger) -> None:
    with pytest.raises(ZeroDivisionError), ledger.section("outer"), ledger.section("inner"):
        1 / 0  # noqa: B018
    with ledger.section("next"):
        pass

    assert [section.num_runs for section in ledger.sections.values()] == [1, 1]
    assert list(ledger.sections) == ["outer", "next"]
    assert ledger.sections["outer"].parts["inner"].num_runs == 1


def test_a_timed_function_keeps_its_name_and_is_evaluated(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[object] = []
    monkeypatch.setattr(timing.mx, "eval", evaluated.append)

    @ledger.timed("double")
    def double(x: mx.array) -> dict[str, object]:
        """Doubles."""
        return {"result": 2 * x, "unit": "ms"}

    result = double(mx.array(4))

    assert (double.__name__, double.__doc__) == ("double", "Doubles.")
    assert [array.item() for array in evaluated[0]] == [8]
    assert result["unit"] == "ms"
    assert ledger.sections["double"].num_runs == 1
    ledger.reset()
    assert ledger.sections == {}
