"""The comparisons notice a broken adapter: each part of it is broken once, in a running engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine.conftest import TinyPair
from tests.engine.engine_process import EnginePool, Workload, assert_same_answers
from tests.engine.test_losslessness import SAMPLED, greedy, seeded
from tests.engine.test_sampling_options import OPTIONS, grammar_workload, options_workload

pytestmark = pytest.mark.engine


def workloads(pair: TinyPair) -> dict[str, Workload]:
    return {
        "greedy": greedy(pair),
        "seeded": seeded(pair, SAMPLED),
        "penalised": options_workload(pair, OPTIONS["repetition penalty"]),
        "structured": grammar_workload(pair, "json", temperature=0),
    }


@pytest.mark.parametrize(
    ("mutation", "name"),
    [
        ("drop_the_commit", "greedy"),
        ("leave_positions_linear", "greedy"),
        ("drop_the_path_writes", "greedy"),
        ("attend_to_every_earlier_node", "greedy"),
        ("draft_trees_for_grammars", "structured"),
        ("hide_accepted_tokens_from_penalties", "penalised"),
        ("draw_behind_the_end", "seeded"),
    ],
)
def test_a_broken_adapter_changes_the_text(
    engines: EnginePool, tiny_pair: TinyPair, mutation: str, name: str
) -> None:
    workload = workloads(tiny_pair)[name]
    plain = engines.run(tiny_pair.plain(), workload)

    broken = engines.run(tiny_pair.drafted(), replace(workload, mutation=mutation))

    with pytest.raises(AssertionError, match="differs"):
        assert_same_answers(broken, plain)
    assert_same_answers(engines.run(tiny_pair.drafted(), workload), plain)


def test_a_wrong_hidden_state_costs_acceptance_and_no_text(engines: EnginePool, tiny_pair: TinyPair) -> None:
    workload = greedy(tiny_pair)

    worse = engines.run(tiny_pair.drafted(), replace(workload, mutation="draft_from_the_root"))

    assert_same_answers(worse, engines.run(tiny_pair.plain(), workload))
    good = engines.run(tiny_pair.drafted(), workload)
    assert worse.stats["num_accepted_tokens"] < 0.5 * good.stats["num_accepted_tokens"]
