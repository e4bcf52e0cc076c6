"""Under model runner V2, a drafter that sees what leaves single layers of the target sees what training showed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.engine import tiny_models
from tests.engine.engine_process import Engine, EnginePool, Workload, assert_same_answers
from tests.engine.v2.conftest import V2Pair
from tests.engine.v2.test_graphs import GREEDY, tokens_per_step, with_all_graphs
from tests.engine.v2.test_graphs import workload as workload_of
from tests.engine.v2.test_losslessness import SAMPLED, resent, seeded

pytestmark = pytest.mark.engine

ENGINES: dict[str, Callable[[V2Pair], Engine]] = {"eager": V2Pair.drafted, "graphs": with_all_graphs}


@pytest.fixture(scope="module")
def fused_pair(v2_pair: V2Pair, tmp_path_factory: pytest.TempPathFactory) -> V2Pair:
    """The tiny target with a drafter that sees what leaves both of its layers."""
    model, directory = tiny_models.make_llama(head_dim=64), tmp_path_factory.mktemp("fused")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    drafter = tiny_models.save_trained_drafter(
        model, directory / "drafter", v2_pair.prompts, num_steps=250, fused_layers=[0, 1]
    )
    torch.set_num_threads(num_threads)
    return v2_pair._replace(drafter=drafter)


@pytest.mark.parametrize("kind", ENGINES)
def test_every_draft_starts_from_what_training_sees(engines: EnginePool, fused_pair: V2Pair, kind: str) -> None:
    workload = workload_of(fused_pair, GREEDY)

    drafted = engines.run(ENGINES[kind](fused_pair), replace(workload, mutation="v2.expect_the_states_of_training"))

    assert_same_answers(drafted, engines.run(fused_pair.plain(), workload))
    assert drafted.stats["num_branch_acceptances"] > 0
    assert (drafted.num_graph_replays > 0) == (drafted.num_piece_replays > 0) == (kind == "graphs")


def test_text_is_that_of_plain_vllm(engines: EnginePool, fused_pair: V2Pair) -> None:
    workload = Workload([*resent(fused_pair, engines).requests, *seeded(fused_pair, SAMPLED).requests])

    drafted = engines.run(fused_pair.drafted(), workload)

    assert_same_answers(drafted, engines.run(fused_pair.plain(), workload))
    assert drafted.stats["num_branch_acceptances"] > 0
    assert drafted.stats["num_commits"] > 0


@pytest.mark.parametrize("kind", ENGINES)
def test_without_the_layers_fewer_drafts_are_accepted(engines: EnginePool, fused_pair: V2Pair, kind: str) -> None:
    workload = workload_of(fused_pair, GREEDY)
    engine = ENGINES[kind](fused_pair)

    blind = engines.run(engine, replace(workload, mutation="v2.draft_from_last_states_alone"))

    seeing = engines.run(engine, workload)
    assert_same_answers(blind, seeing)
    assert tokens_per_step(blind) < 0.9 * tokens_per_step(seeing)
