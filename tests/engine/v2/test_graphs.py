"""With CUDA graphs the text is the same: what they hold of a step fits every later one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.engine_process import Engine, EnginePool, Request, Workload, assert_same_answers
from tests.engine.v2.conftest import NUM_NODES, V2Pair

pytestmark = pytest.mark.engine

ROWS = 1 + NUM_NODES


def with_graphs(pair: V2Pair) -> Engine:
    """Returns the drafting engine, its decode steps and drafts captured for one, two and four requests."""
    sizes = [1, 2, 4, ROWS, 2 * ROWS, 4 * ROWS]
    compilation = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    environment = {**pair.environment, "RECORD_CUDA_GRAPHS": "1"}
    return pair._replace(environment=environment).drafted(enforce_eager=False, compilation_config=compilation)


def workload(pair: V2Pair, sampling: dict[str, Any]) -> Workload:
    """Returns requests that begin and end at different times: graphs of four are replayed for three, too."""
    return Workload(
        [
            Request(prompt, {**sampling, "max_tokens": 10 + 4 * index, "ignore_eos": True}, add_after=2 * index)
            for index, prompt in enumerate(pair.prompts)
        ]
    )


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "seeded"])
def test_text_from_graphs_is_that_of_plain_vllm(engines: EnginePool, v2_pair: V2Pair, sampling: dict[str, Any]) -> None:
    requests = workload(v2_pair, sampling)

    drafted = engines.run(with_graphs(v2_pair), requests)

    assert_same_answers(drafted, engines.run(v2_pair.plain(), requests))
    assert drafted.stats["num_accepted_tokens"] > 0
    assert drafted.stats["num_commits"] > 0
    # one per draft, and one per verification of trees alone
    assert drafted.num_graph_replays > 1.5 * drafted.stats["num_steps"] / len(v2_pair.prompts)
