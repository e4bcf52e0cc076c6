from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_redrafter.adapter import runner as runner_module
from vllm_redrafter.adapter.budget import Choice, StepTimes
from vllm_redrafter.adapter.runner import TreeModelRunner
from vllm_redrafter.adapter.stats import Stats
from vllm_redrafter.adapter.target_matrices import TargetMatrices
from vllm_redrafter.adapter.tree_batch import assemble
from vllm_redrafter.adapter.verification import Walk
from vllm_redrafter.core.beam_search import Candidates

# two children of the root, and two of the better one
CANDIDATES = Candidates(
    torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-1, -1, 0, 0]]), torch.tensor([[-0.25, -1.0, -0.5, -0.75]])
)


def agreed_choice(
    choice: Choice, monkeypatch: pytest.MonkeyPatch
) -> tuple[Candidates, list[int], list[list[list[float]]]]:
    """Return what a runner makes of a budget's choice, and what the budget was asked about."""
    monkeypatch.setattr(runner_module, "_from_first_rank", lambda decision: decision)
    asked: list[list[list[float]]] = []
    runner = object.__new__(TreeModelRunner)
    runner._budget = SimpleNamespace(choose=lambda trees, chains, greedy: (asked.extend((trees, chains)), choice)[1])
    return (*runner._agreed_choice(CANDIDATES, [True]), asked)


def test_a_budget_is_asked_about_trees_and_about_their_best_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    found, budgets, (trees, chains) = agreed_choice(Choice([3], as_chains=False), monkeypatch)

    assert trees == [[-0.25, -0.5, -0.75, -1.0]]
    assert chains == [[-0.25, -0.5, -math.inf, -math.inf]]
    assert (found, budgets) == (CANDIDATES, [3])


def test_where_chains_were_chosen_nothing_beside_the_best_path_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    found, budgets, _ = agreed_choice(Choice([2], as_chains=True), monkeypatch)

    assert found.log_probs.tolist() == [[-0.25, -math.inf, -0.5, -math.inf]]
    assert budgets == [2]


@pytest.mark.parametrize(("budget", "measured"), [("auto", [4 * (1 + 8)]), ("fixed", [])])
def test_passes_are_measured_where_the_budget_is_automatic(
    budget: str, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    told: list[float] = []

    def measure(runner: TreeModelRunner, most_rows: int, decide: object) -> StepTimes:
        sizes.append(most_rows)
        return StepTimes(np.array([1.0, 2.0]), np.array([0.5, 1.0]))

    monkeypatch.setattr(runner_module.step_times, "measure", measure)
    runner = object.__new__(TreeModelRunner)
    runner._budget, runner.max_num_reqs, runner._matrices = None, 4, TargetMatrices(wanted=False)
    runner.attn_groups = []
    options = SimpleNamespace(budget=budget, num_speculative_tokens=8, draft_length=4)
    runner.drafter = SimpleNamespace(options=options, tune=lambda seconds: told.append(seconds(2)))

    runner.calibrate()

    assert sizes == measured
    assert told == [1.0] * len(measured)
    assert (runner._budget is not None) == bool(measured)


def test_every_request_that_samples_has_a_generator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUModelRunner, "_update_states", lambda self, output: "what vLLM returns")
    seeded = torch.Generator()
    parameters = {"greedy": SamplingParams(temperature=0), "seeded": SamplingParams(seed=1)}
    parameters |= {"first": SamplingParams(), "second": SamplingParams(top_p=0.5)}
    runner = object.__new__(TreeModelRunner)
    runner.requests = {
        name: SimpleNamespace(sampling_params=each, generator=seeded if name == "seeded" else None)
        for name, each in parameters.items()
    }
    places = {name: place for place, name in enumerate(parameters)}
    runner.input_batch = SimpleNamespace(generators={1: seeded}, req_id_to_index=places)
    new = SimpleNamespace(scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in parameters])

    assert runner._update_states(new) == "what vLLM returns"

    generators = {name: state.generator for name, state in runner.requests.items()}
    assert generators["greedy"] is None
    assert generators["seeded"] is seeded
    assert generators["first"].get_state().tolist() != generators["second"].get_state().tolist()
    assert runner.input_batch.generators == {places[name]: generators[name] for name in ("seeded", "first", "second")}


def test_what_was_foretold_of_a_pass_is_held_against_that_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUModelRunner, "execute_model", lambda self, output, tensors: None)
    monkeypatch.setattr(runner_module, "_from_first_rank", lambda decision: decision)
    foretold: list[float | None] = []
    runner = object.__new__(TreeModelRunner)
    runner._budget = SimpleNamespace(
        choose=lambda trees, chains, greedy: Choice([3], as_chains=False, forward_seconds=0.25),
        observe_step=lambda step: foretold.append(step.foretold_seconds),
    )
    runner._batch = SimpleNamespace(trees=[SimpleNamespace(token_ids=[5])], num_nodes=1, num_branching=0)
    runner._decoding, runner._step_started, runner._forward_seconds, runner._draft_seconds = {"a"}, 0.0, 0.0, None
    runner._foretold_seconds = runner._next_foretold_seconds = None
    step = SimpleNamespace(
        num_scheduled_tokens={"a": 2}, total_num_scheduled_tokens=2, scheduled_spec_decode_tokens={"a": [5]}
    )

    runner.execute_model(step)  # learns from the step before, for which nothing was chosen
    runner._agreed_choice(CANDIDATES, [True])
    for _ in range(3):
        runner.execute_model(step)

    assert foretold == [None, None, 0.25, None]


def test_of_a_step_without_drafts_every_request_counts_that_could_have_had_some() -> None:
    names = ["first token", "one", "two", "in its prompt again"]
    runner = object.__new__(TreeModelRunner)
    runner._budget, runner.stats = None, Stats()
    runner._batch = assemble({}, names, {}, [3, 4, 5, 9])
    outputs: list[list[int]] = [[], [8], [8, 9], [8]]
    runner.input_batch = SimpleNamespace(req_ids=names, req_output_token_ids=outputs)

    runner._count(Walk([[7]] * 4, [[0]] * 4), frozenset([3]))

    assert (runner.stats.num_engine_steps, runner.stats.num_steps, runner.stats.num_emitted_tokens) == (1, 2, 2)
    assert (runner.stats.num_drafts, runner.stats.num_draft_tokens, runner.stats.num_accepted_tokens) == (0, 0, 0)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_without_drafts_is_prepared_as_plain_vllm_does(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    prepared_with: list[object] = []

    def prepare(self: TreeModelRunner, output: object, scheduled: object) -> str:
        prepared_with.append(self.speculative_config)
        if fails:
            raise RuntimeError("out of something")
        return "what vLLM returns"

    monkeypatch.setattr(CPUModelRunner, "_prepare_inputs", prepare)
    runner = object.__new__(TreeModelRunner)
    runner.speculative_config, runner._proposed, runner.stats = "ours", {}, Stats()
    runner._batch = assemble({}, [], {}, [])
    runner.input_batch = SimpleNamespace(req_ids=["a", "b"])
    runner.positions, runner.input_ids = torch.arange(4), SimpleNamespace(gpu=torch.tensor([5, -1, -1, 5]))
    steps = ({}, {"a": [-1, -1]})
    for drafts in steps:
        output = SimpleNamespace(scheduled_spec_decode_tokens=drafts, finished_req_ids=set())
        scheduled = np.array([1 + len(drafts.get(name, [])) for name in ("a", "b")])
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            assert runner._prepare_inputs(output, scheduled) == "what vLLM returns"
        assert runner.speculative_config == "ours"

    assert prepared_with == [None, "ours"]
    if not fails:
        assert runner._batch.num_nodes == 2
        assert runner.input_ids.gpu.tolist() == [5, 0, 0, 5], "padding has a token that can be looked up"


def test_where_nothing_is_drafted_vllm_is_told_of_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "_from_first_rank", lambda decision: decision)
    runner = object.__new__(TreeModelRunner)
    runner.stats, runner.input_batch = Stats(), SimpleNamespace(req_ids=["a", "b"])
    asked: list[int] = []
    runner._budget = SimpleNamespace(should_draft=lambda batch_size: bool(asked.append(batch_size)))
    runner._draft_seconds = 1.0

    def propose(tokens: list[list[int]]) -> list[list[int]]:
        return runner.propose_draft_token_ids(None, tokens, None, torch.zeros(2, 1), torch.zeros(2, 1), None)

    assert propose([[], []]) == [], "all are in the middle of their prompts"
    assert propose([[], [7]]) == []

    assert asked == [1]
    assert runner.stats.num_skipped_drafts == 1
    assert runner._draft_seconds is None
