from __future__ import annotations

import pytest
import torch

from tests.engine.v2 import recorded_graphs
from tests.engine.v2.recorded_graphs import RecordedGraph, capture, kernel


def test_a_replay_reads_and_writes_the_memory_of_its_capture() -> None:
    source, out = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    graph = RecordedGraph()
    with capture(graph):
        doubled = source[:2] * 2
        out[:2].copy_(doubled.add_(1))
        out[2:] = torch.cat((source, doubled)).sum()

    source.copy_(torch.tensor([10.0, 20.0, 30.0]))
    graph.replay()

    assert out.tolist() == [21, 41, 122]


def test_what_the_host_knew_at_capture_stays() -> None:
    length, source, out = 2, torch.ones(4), torch.zeros(())
    graph = RecordedGraph()
    with capture(graph):
        out.copy_(source[:length].sum() + length)

    length, source = 4, torch.full((4,), 5.0)
    graph.replay()

    assert out == 4


def test_what_a_capture_allocated_holds_garbage_when_a_replay_begins() -> None:
    out = torch.zeros(2)
    first, second = RecordedGraph(), RecordedGraph()
    with capture(first):
        kept = torch.ones(2) + 1
    with capture(second):
        out.copy_(kept)

    first.replay()
    assert kept.tolist() == [2, 2]
    second.replay()

    assert out.isnan().all()


def test_a_piece_reads_what_the_pieces_before_it_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_graphs, "_is_piecewise", lambda: True)
    source, out = torch.ones(2), torch.zeros(2)
    first, second = RecordedGraph(), RecordedGraph()
    with capture(first):
        between = source + 1
    with capture(second):
        out.copy_(between)

    source.fill_(5)
    first.replay()
    second.replay()

    assert out.tolist() == [6, 6]


def test_what_is_marked_is_one_kernel() -> None:
    source, out = torch.tensor([3, 1, 2]), torch.zeros(3, dtype=torch.int64)

    def sort_on_the_host() -> None:
        out.copy_(torch.tensor(sorted(source.tolist()[: int(source.max())])))

    graph = RecordedGraph()
    with capture(graph):
        kernel(sort_on_the_host)
    source.copy_(torch.tensor([9, 8, 7]))
    graph.replay()

    assert len(graph.kernels) == 1
    assert out.tolist() == [7, 8, 9]


def test_the_host_must_not_read_while_a_graph_is_captured() -> None:
    with pytest.raises(AssertionError, match="the host reads"), capture(RecordedGraph()):
        torch.ones(1).item()
