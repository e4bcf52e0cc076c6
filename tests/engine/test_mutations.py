"""The comparisons notice a broken adapter: each part of it is broken once, in a running engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.engine.conftest import TinyPair
from tests.engine.engine_process import EnginePool, Workload, assert_same_answers
from tests.engine.test_losslessness import SAMPLED, greedy, seeded
from tests.engine.test_sampling_options import grammar_workload
from tests.engine.test_scheduling import GREEDY, padding_workload

pytestmark = pytest.mark.engine


def bigrams_are_bad(engines: EnginePool, pair: TinyPair) -> Workload:
    """Return greedy prompts that may not say what they would say at two places."""
    requests = greedy(pair).requests
    bad_words = []
    for texts in engines.run(pair.plain(), greedy(pair)).texts():
        assert texts is not None
        bad_words += [texts[0][20:22], texts[0][41:43]]
    return Workload([replace(each, sampling={**each.sampling, "bad_words": bad_words}) for each in requests])


WORKLOADS: dict[str, Callable[[EnginePool, TinyPair], Workload]] = {
    "greedy": lambda engines, pair: greedy(pair),
    "seeded": lambda engines, pair: seeded(pair, SAMPLED),
    "bad words": bigrams_are_bad,
    "structured": lambda engines, pair: grammar_workload(pair, "dotted", temperature=0),
    "padded": lambda engines, pair: padding_workload(pair, GREEDY),
}


@pytest.mark.parametrize(
    ("mutation", "name"),
    [
        ("drop_the_commit", "greedy"),
        ("drop_the_commit_of_rounds", "greedy"),
        ("leave_positions_linear", "greedy"),
        ("drop_the_path_writes", "greedy"),
        ("attend_to_every_earlier_node", "greedy"),
        ("accept_the_padding", "padded"),
        ("draft_trees_for_grammars", "structured"),
        ("hide_accepted_tokens_from_the_sampler", "bad words"),
        ("draw_behind_the_end", "seeded"),
    ],
)
def test_a_broken_adapter_changes_the_text(engines: EnginePool, tiny_pair: TinyPair, mutation: str, name: str) -> None:
    workload = WORKLOADS[name](engines, tiny_pair)
    plain = engines.run(tiny_pair.plain(), workload)

    broken = engines.run(tiny_pair.drafted(), replace(workload, mutation=mutation))

    with pytest.raises(AssertionError, match="differs"):
        assert_same_answers(broken, plain)
    assert_same_answers(engines.run(tiny_pair.drafted(), workload), plain)


def test_trees_served_in_rounds_give_the_same_text(engines: EnginePool, tiny_pair: TinyPair) -> None:
    workload = greedy(tiny_pair)

    in_rounds = engines.run(tiny_pair.drafted(), replace(workload, mutation="serve_trees_in_rounds"))

    assert_same_answers(in_rounds, engines.run(tiny_pair.plain(), workload))
    assert in_rounds.stats["num_commits"] > 0


def test_a_wrong_hidden_state_costs_acceptance_and_no_text(engines: EnginePool, tiny_pair: TinyPair) -> None:
    workload = greedy(tiny_pair)

    worse = engines.run(tiny_pair.drafted(), replace(workload, mutation="draft_from_the_neighbours_state"))

    assert_same_answers(worse, engines.run(tiny_pair.plain(), workload))
    good = engines.run(tiny_pair.drafted(), workload)
    assert worse.stats["num_accepted_tokens"] < 0.5 * good.stats["num_accepted_tokens"]


def test_without_foresight_fewer_drafts_are_accepted_and_no_text_changes(
    engines: EnginePool, tiny_pair: TinyPair
) -> None:
    workload = seeded(tiny_pair, SAMPLED)

    blind = engines.run(tiny_pair.drafted(), replace(workload, mutation="draft_without_foresight"))

    seeing = engines.run(tiny_pair.drafted(), workload)
    assert_same_answers(blind, seeing)
    accepted = [run.stats["num_emitted_tokens"] / run.stats["num_steps"] - 1 for run in (blind, seeing)]
    assert accepted[1] > 1.2 * accepted[0] > 0
