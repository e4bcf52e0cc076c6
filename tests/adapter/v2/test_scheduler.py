"""What the scheduler tells its table of sizes, and which scheduler an engine gets."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_redrafter.adapter.patches import PROPOSER_PATH
from vllm_redrafter.adapter.v2 import scheduler
from vllm_redrafter.adapter.v2.scheduler import AsyncTreeScheduler, TreeScheduler, learn
from vllm_redrafter.adapter.v2.sizes import TreeSizes

DRAFT = [-1, -1, -1, -1]


class Told:
    """In the place of a table: keeps what it is told."""

    def __init__(self) -> None:
        self.trees: list[tuple[int, int, int]] = []
        self.steps: list[tuple[int, int, float]] = []

    def observe_trees(self, *told: int) -> None:
        self.trees.append(told)  # type: ignore[arg-type]

    def observe_step(self, *told: Any) -> None:
        self.steps.append(told)  # type: ignore[arg-type]


def step(
    num_scheduled: dict[str, int], drafts: dict[str, list[int]], sampled: list[list[int]], new: Sequence[str] = ()
) -> tuple[SimpleNamespace, SimpleNamespace]:
    index = {request: place for place, request in enumerate(num_scheduled)}
    return (
        SimpleNamespace(
            num_scheduled_tokens=num_scheduled, scheduled_spec_decode_tokens=drafts, scheduled_new_reqs=new
        ),
        SimpleNamespace(req_id_to_index=index, sampled_token_ids=sampled),
    )


@pytest.mark.parametrize(
    ("num_scheduled", "drafts", "sampled", "trees", "steps"),
    [
        ({"a": 5, "b": 5}, {"a": DRAFT, "b": DRAFT}, [[7, 8, 9], [7]], (4, 2, 2), [(2, 4, 0.5)]),
        ({"a": 1, "b": 1}, {}, [[7], [7]], (0, 0, 0), [(2, 0, 0.5)]),
        # a prompt, which says nothing of what decoding takes
        ({"a": 5, "b": 40}, {"a": DRAFT}, [[7, 8], [7]], (4, 1, 1), []),
        ({"a": 40}, {}, [[]], (0, 0, 0), []),
        # one tree that the scheduler had to cut
        ({"a": 5, "b": 3}, {"a": DRAFT, "b": DRAFT[:2]}, [[7], [7, 8]], (4, 1, 0), []),
        # one that was preempted while it was verified
        ({"a": 5, "b": 5}, {"a": DRAFT, "b": DRAFT}, [[], [7, 8]], (4, 1, 1), [(2, 4, 0.5)]),
    ],
    ids=["trees", "none", "trees and a prompt", "a prompt", "a tree cut short", "nothing drawn"],
)
def test_what_is_learnt_from_a_step(
    num_scheduled: dict[str, int],
    drafts: dict[str, list[int]],
    sampled: list[list[int]],
    trees: tuple[int, int, int],
    steps: list[tuple[int, int, float]],
) -> None:
    told = Told()

    learn(told, *step(num_scheduled, drafts, sampled), 0.5)  # type: ignore[arg-type]

    assert (told.trees, told.steps) == ([trees], steps)


@pytest.mark.parametrize(
    ("is_async", "model", "expected"),
    [
        (True, PROPOSER_PATH, AsyncTreeScheduler),
        (False, PROPOSER_PATH, TreeScheduler),
        (True, None, AsyncScheduler),
        (False, None, Scheduler),
    ],
)
def test_an_engine_without_our_drafter_gets_the_scheduler_that_vllm_has(
    monkeypatch: pytest.MonkeyPatch, is_async: bool, model: str | None, expected: type[Scheduler]
) -> None:
    for name in ("AsyncTreeScheduler", "TreeScheduler", "AsyncScheduler", "Scheduler"):
        monkeypatch.setattr(scheduler, name, lambda vllm_config, name=name, **kwargs: name)
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=is_async),
        speculative_config=model and SimpleNamespace(model=model),
    )

    assert scheduler.make(vllm_config, block_size=16) == expected.__name__


def test_a_prompt_whose_prefix_was_cached_is_no_step_of_decoding() -> None:
    told = Told()

    learn(told, *step({"a": 1}, {}, [[7]], new=["a"]), 30.0)  # type: ignore[arg-type]

    assert told.steps == []


class FakeScheduler:
    def __init__(self, table: list[int] | None) -> None:
        self.dynamic_sd_lookup: Any = table

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> str:
        return "what vLLM returns"


class FakeTreeScheduler(scheduler._LearnsSizes, FakeScheduler):
    pass


def test_vllms_table_gives_way_to_one_that_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 3.5])
    monkeypatch.setattr(scheduler.time, "perf_counter", lambda: next(clock))
    learning = FakeTreeScheduler([0, 4, 4, 0])
    table = learning.dynamic_sd_lookup
    told = learning.dynamic_sd_lookup = Told()

    for _ in range(2):
        assert learning.update_from_output(*step({"a": 1}, {}, [[7]])) == "what vLLM returns"

    assert isinstance(table, TreeSizes)
    assert {table[batch_size] for batch_size in (1, 300)} == {4, 0}
    assert told.steps == [(1, 0, 2.0), (1, 0, 0.5)]


def test_only_sizes_in_vllms_table_are_chosen() -> None:
    assert FakeTreeScheduler([0, 4, 4]).dynamic_sd_lookup[300] == 4


def test_a_step_of_nothing_teaches_nothing() -> None:
    learning = FakeTreeScheduler([0, 4, 4, 0])
    told = learning.dynamic_sd_lookup = Told()

    learning.update_from_output(*step({}, {}, []))

    assert (told.trees, told.steps) == ([], [])


def test_without_a_table_nothing_is_learnt() -> None:
    learning = FakeTreeScheduler(None)

    assert learning.update_from_output(*step({"a": 1}, {}, [[7]])) == "what vLLM returns"
    assert learning.dynamic_sd_lookup is None
