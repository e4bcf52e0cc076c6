"""The comparisons notice a broken adapter for V2, and nothing in its steps waits for the device or moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.engine.engine_process import EnginePool, Workload, assert_same_answers
from tests.engine.test_sampling_options import assert_same_logprobs
from tests.engine.v2.conftest import V2Pair
from tests.engine.v2.test_losslessness import SAMPLED, resent, seeded
from tests.engine.v2.test_sampling_options import LINEAR, LOGPROBS, options_workload

pytestmark = pytest.mark.engine

WORKLOADS: dict[str, Callable[[EnginePool, V2Pair], Workload]] = {
    "greedy": lambda engines, pair: resent(pair, engines),
    "seeded": lambda engines, pair: seeded(pair, SAMPLED),
    "penalty": lambda engines, pair: options_workload(pair, LINEAR["negative penalties"]),
    "logprobs": lambda engines, pair: options_workload(pair, LOGPROBS["greedy"]),
}


@pytest.mark.parametrize(
    ("mutation", "name"),
    [
        ("drop_the_commit", "greedy"),
        ("leave_positions_linear", "greedy"),
        ("attend_to_every_earlier_node", "greedy"),
    ],
)
def test_a_broken_adapter_changes_the_text(engines: EnginePool, v2_pair: V2Pair, mutation: str, name: str) -> None:
    workload = WORKLOADS[name](engines, v2_pair)
    plain = engines.run(v2_pair.plain(), workload)

    broken = engines.run(v2_pair.drafted(), replace(workload, mutation=f"v2.{mutation}"))

    with pytest.raises(AssertionError, match="differs"):
        assert_same_answers(broken, plain)


def test_trees_where_an_option_needs_a_chain_are_noticed(engines: EnginePool, v2_pair: V2Pair) -> None:
    workload = WORKLOADS["penalty"](engines, v2_pair)

    broken = engines.run(v2_pair.drafted(), replace(workload, mutation="v2.draft_trees_for_everybody"))

    # the text differs only where a sibling's token is the next one, which no short text can be relied on for
    assert broken.stats["num_branching_trees"] > 0
    assert engines.run(v2_pair.drafted(), workload).stats["num_branching_trees"] == 0


def test_logprobs_of_the_wrong_rows_are_noticed(engines: EnginePool, v2_pair: V2Pair) -> None:
    workload = WORKLOADS["logprobs"](engines, v2_pair)

    broken = engines.run(v2_pair.drafted(), replace(workload, mutation="v2.forget_the_branch_of_logprobs"))

    with pytest.raises(AssertionError):
        assert_same_logprobs(broken, engines.run(v2_pair.plain(), workload))


@pytest.mark.parametrize("guard", ["forbid_waiting", "forbid_moving"])
@pytest.mark.parametrize("name", ["greedy", "seeded", "logprobs"])
def test_a_step_neither_waits_for_the_device_nor_moves_what_it_reads(
    engines: EnginePool, v2_pair: V2Pair, guard: str, name: str
) -> None:
    workload = WORKLOADS[name](engines, v2_pair)

    guarded = engines.run(v2_pair.drafted(), replace(workload, mutation=f"v2.{guard}"))

    assert_same_answers(guarded, engines.run(v2_pair.plain(), workload))
    assert guarded.stats["num_accepted_tokens"] > 0


def test_a_step_launches_few_kernels_outside_its_graphs(engines: EnginePool, v2_pair: V2Pair) -> None:
    workload = WORKLOADS["seeded"](engines, v2_pair)

    guarded = engines.run(v2_pair.drafted(), replace(workload, mutation="v2.forbid_many_launches"))

    assert_same_answers(guarded, engines.run(v2_pair.plain(), workload))


def test_without_foresight_fewer_drafts_are_accepted_and_no_text_changes(engines: EnginePool, v2_pair: V2Pair) -> None:
    workload = WORKLOADS["seeded"](engines, v2_pair)

    blind = engines.run(v2_pair.drafted(), replace(workload, mutation="v2.draft_without_foresight"))

    seeing = engines.run(v2_pair.drafted(), workload)
    assert_same_answers(blind, seeing)
    accepted = [run.stats["num_emitted_tokens"] / run.stats["num_steps"] - 1 for run in (blind, seeing)]
    assert accepted[1] > 1.15 * accepted[0] > 0
