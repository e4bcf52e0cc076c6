"""With CUDA graphs the text is the same: what they hold of a step fits every later one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.engine.engine_process import Engine, EnginePool, Request, Result, Workload, assert_same_answers
from tests.engine.v2.conftest import NUM_NODES, V2Pair

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0}
SEEDED = {"temperature": 1.0, "seed": 3}


# in rows: verifications and drafts for one, two and four requests
SIZES = {count * rows for count in (1, 2, 4) for rows in (1, 1 + 4, 1 + NUM_NODES)}


def with_graphs(pair: V2Pair, **speculation: Any) -> Engine:
    """Returns the drafting engine, its verifications and drafts captured for one, two and four requests."""
    return _recording(pair, speculation, {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}, SIZES)


def with_all_graphs(pair: V2Pair, **speculation: Any) -> Engine:
    """Returns the same as vLLM makes it on a GPU: the target compiled, and steps with prompts replayed in pieces."""
    compilation = {
        "mode": 3,
        "cudagraph_mode": "FULL_AND_PIECEWISE",
        # what a GPU would have besides: kernels that torch generates, and fused ones
        "backend": "eager",
        "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},
    }
    return _recording(pair, speculation, compilation, {*SIZES, 64})


def _recording(pair: V2Pair, speculation: dict[str, Any], compilation: dict[str, Any], sizes: set[int]) -> Engine:
    environment = {**pair.environment, "RECORD_CUDA_GRAPHS": "1"}
    compilation["cudagraph_capture_sizes"] = sorted(sizes)
    return pair._replace(environment=environment).drafted(
        speculation, enforce_eager=False, compilation_config=compilation
    )


def workload(pair: V2Pair, sampling: dict[str, Any]) -> Workload:
    """Returns requests that begin and end at different times: graphs of four are replayed for three, too."""
    return Workload(
        [
            Request(prompt, {**sampling, "max_tokens": 10 + 4 * index, "ignore_eos": True}, add_after=2 * index)
            for index, prompt in enumerate(pair.prompts)
        ]
    )


def tokens_per_step(result: Result) -> float:
    return result.stats["num_emitted_tokens"] / result.stats["num_steps"]


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_text_from_graphs_is_that_of_plain_vllm(engines: EnginePool, v2_pair: V2Pair, sampling: dict[str, Any]) -> None:
    requests = workload(v2_pair, sampling)

    drafted = engines.run(with_graphs(v2_pair), requests)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), requests))
    assert drafted.stats["num_accepted_tokens"] > 0
    assert drafted.stats["num_commits"] > 0
    # every draft is one, and so is a verification, but where a prompt comes between
    assert drafted.num_graph_replays > 1.4 * (drafted.num_engine_steps - len(v2_pair.prompts))


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_text_from_a_compiled_target_and_graphs_of_all_steps_is_that_of_plain_vllm(
    engines: EnginePool, v2_pair: V2Pair, sampling: dict[str, Any]
) -> None:
    requests = workload(v2_pair, sampling)

    drafted = engines.run(with_all_graphs(v2_pair), requests)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), requests))
    assert drafted.stats == engines.run(v2_pair.drafted(), requests).stats
    assert drafted.num_graph_replays > 1.4 * (drafted.num_engine_steps - len(v2_pair.prompts))
    # before, between and behind the two layers' attention
    assert drafted.num_piece_replays >= 3 * len(v2_pair.prompts)
    assert engines.run(with_graphs(v2_pair), requests).num_piece_replays == 0


def test_three_requests_replay_the_graphs_of_four(engines: EnginePool, v2_pair: V2Pair) -> None:
    sampling = {**GREEDY, "max_tokens": 24, "ignore_eos": True}
    requests = Workload([Request(prompt, sampling) for prompt in v2_pair.prompts[:3]])

    drafted = engines.run(with_graphs(v2_pair), requests)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), requests))
    assert drafted.num_graph_replays > 1.4 * (drafted.num_engine_steps - len(requests.requests))


def test_the_same_trees_are_drafted_and_accepted_as_without_graphs(engines: EnginePool, v2_pair: V2Pair) -> None:
    requests = workload(v2_pair, GREEDY)

    drafted, eager = engines.run(with_graphs(v2_pair), requests), engines.run(v2_pair.drafted(), requests)

    assert drafted.stats == eager.stats
    assert eager.num_graph_replays == 0


def test_sizes_by_batch_have_graphs_of_their_own(engines: EnginePool, v2_pair: V2Pair) -> None:
    sizes = {"num_speculative_tokens_per_batch_size": [[1, 2, NUM_NODES], [3, 4, 4]]}
    requests = workload(v2_pair, GREEDY)

    drafted = engines.run(with_graphs(v2_pair, **sizes), requests)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), requests))
    assert drafted.num_graph_replays > 1.4 * (drafted.num_engine_steps - len(v2_pair.prompts))


def test_an_automatic_budget_replays_graphs_of_every_size(engines: EnginePool, v2_pair: V2Pair) -> None:
    requests = workload(v2_pair, GREEDY)
    in_turn = replace(requests, mutation="v2.choose_another_size_at_every_step")

    drafted = engines.run(with_graphs(v2_pair, budget="auto"), in_turn)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), requests))
    assert drafted.stats["num_truncated_trees"] > 0
    # of four steps three draft, and all verify or decode
    assert drafted.num_graph_replays > 1.6 * (drafted.num_engine_steps - len(requests.requests))


def test_ancestors_that_a_graph_does_not_see_are_noticed(engines: EnginePool, v2_pair: V2Pair) -> None:
    requests = replace(workload(v2_pair, GREEDY), mutation="v2.keep_ancestors_where_no_graph_looks")
    plain = engines.run(v2_pair.plain(), workload(v2_pair, GREEDY))

    broken = engines.run(with_graphs(v2_pair), requests)

    assert_same_answers(engines.run(v2_pair.drafted(), requests), plain)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_answers(broken, plain)


def test_hidden_states_that_a_graph_does_not_see_cost_acceptance(engines: EnginePool, v2_pair: V2Pair) -> None:
    requests = replace(workload(v2_pair, GREEDY), mutation="v2.keep_hidden_states_where_no_graph_looks")

    broken, eager = engines.run(with_graphs(v2_pair), requests), engines.run(v2_pair.drafted(), requests)

    assert_same_answers(broken, eager)
    assert tokens_per_step(broken) < 0.9 * tokens_per_step(eager)
