from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from tests.adapter.trees import tree_of
from vllm_redrafter.adapter import runner as runner_module
from vllm_redrafter.adapter.budget import Choice
from vllm_redrafter.adapter.costs import StepRecord, StepTimes
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
    assert chains == [[-0.25, -0.5]]
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
    runner._resumed, runner._is_plain, runner._steps_to_skip, runner._num_sampled = frozenset(), False, 0, 0
    step = step_of({"a": 2}, {"a": [5]}, num_outputs=(3,))

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


def step_of(
    counts: dict[str, int],
    drafts: dict[str, list[int]],
    *,
    new: tuple[str, ...] = (),
    num_outputs: tuple[int, ...] = (3, 5),
    resumed: tuple[str, ...] = (),
    finished: tuple[str, ...] = (),
) -> SimpleNamespace:
    """Return what a scheduler says of a step, in so many rows for every request."""
    return SimpleNamespace(
        scheduled_cached_reqs=SimpleNamespace(num_output_tokens=list(num_outputs), resumed_req_ids=set(resumed)),
        finished_req_ids=set(finished),
        num_scheduled_tokens=counts,
        total_num_scheduled_tokens=sum(counts.values()),
        scheduled_spec_decode_tokens=drafts,
        scheduled_new_reqs=list(new),
    )


class Steps:
    """A runner of two requests whose steps do nothing but note whose they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, is_automatic: bool = True, drafts: bool = False) -> None:
        monkeypatch.setattr(runner_module, "_from_first_rank", lambda decision: decision)
        monkeypatch.setattr(CPUModelRunner, "execute_model", lambda runner, *args: self.note())
        monkeypatch.setattr(CPUModelRunner, "sample_tokens", lambda runner, *args: self.note())
        self.noted: list[object] = []
        self.asked: list[int] = []
        self.learnt: list[StepRecord] = []
        self.error: Exception | None = None
        self.runner = object.__new__(TreeModelRunner)
        self.runner.speculative_config, self.runner.stats = "ours", Stats()
        self.runner._decoding, self.runner._next_foretold_seconds = frozenset(), None
        self.runner._batch, self.runner._proposed = assemble({}, [], {}, []), {}
        self.runner._budget, self.runner._resumed, self.runner._steps_to_skip = None, frozenset(), 0
        self.runner._step_started, self.runner._num_sampled = None, 0
        if is_automatic:
            self.runner._budget = SimpleNamespace(
                should_draft=lambda batch_size, num_sampled: (self.asked.append(batch_size), drafts)[1],
                floor=lambda greedy: -len(greedy) / 2,
                observe_step=self.learnt.append,
                wants_plain_step=lambda batch_size, num_sampled: True,
                skip_steps=lambda batch_size, num_sampled: 0,
            )
        self.runner.input_batch = SimpleNamespace(req_ids=["a", "b"])
        self.runner.requests = dict.fromkeys("abc", SimpleNamespace(sampling_params=SamplingParams(temperature=0)))

    def note(self) -> None:
        is_ours = type(self.runner) is TreeModelRunner
        assert self.runner.speculative_config == ("ours" if is_ours else None)
        self.noted.append(type(self.runner))
        if self.error is not None:
            raise self.error

    def run(self, step: SimpleNamespace) -> list[object]:
        self.noted.clear()
        for call in (self.runner.execute_model, self.runner.sample_tokens):
            call(step)
            assert (type(self.runner), self.runner.speculative_config) == (TreeModelRunner, "ours")
        return self.noted


def test_a_step_that_neither_verifies_nor_drafts_is_plain_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    runner = steps.runner
    runner._proposed = {name: tree_of([(1,)]) for name in ("a", "ended", "waiting")}

    assert steps.run(step_of({"a": 1, "b": 1}, {}, finished=("ended",))) == [CPUModelRunner] * 2

    assert steps.asked == [2]
    assert (runner.stats.num_engine_steps, runner.stats.num_skipped_drafts) == (1, 1)
    assert (runner.stats.num_steps, runner.stats.num_emitted_tokens) == (2, 2)
    assert runner._batch == assemble({}, ["a", "b"], {}, [1, 2])
    assert list(runner._proposed) == ["waiting"], "its drafts may still be scheduled"
    steps.error = RuntimeError("out of something")
    for call in (runner.execute_model, runner.sample_tokens):
        with pytest.raises(RuntimeError):
            call(step_of({"a": 1, "b": 1}, {}))
        assert (type(runner), runner.speculative_config) == (TreeModelRunner, "ours")
    assert steps.noted == [CPUModelRunner] * 4


@pytest.mark.parametrize(
    "step",
    [
        step_of({"a": 1, "b": 3}, {"b": [7, 8]}),
        step_of({"a": 1, "b": 9}, {}),
        step_of({"a": 1, "b": 1}, {}, new=("b",)),
        step_of({"a": 1, "b": 1}, {}, num_outputs=(3, 0)),
        step_of({"a": 1, "b": 1}, {}, resumed=("b",)),
        step_of({}, {}, num_outputs=()),
    ],
    ids=["drafts", "a prompt", "a prompt of one token", "one token of a prompt", "a preempted request", "nothing"],
)
def test_other_steps_are_ours(step: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.run(step_of({"a": 1, "b": 1}, {}))
    steps.runner._decoding = frozenset()

    assert steps.run(step) == [TreeModelRunner] * 2

    assert steps.asked == [2], "it is asked when it is known who emits a token"


def test_steps_that_nothing_is_to_be_decided_about_are_plain_vllms_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    plain = step_of({"a": 1, "b": 1}, {})
    steps.run(plain)
    steps.runner._budget.skip_steps = lambda batch_size, num_sampled: 3

    for asked in ([2, 2], [2, 2], [2, 2], [2, 2], [2, 2, 2]):
        assert steps.run(plain) == [CPUModelRunner] * 2
        assert steps.asked == asked

    stats = steps.runner.stats
    assert (stats.num_engine_steps, stats.num_skipped_drafts) == (6, 6)
    assert (stats.num_steps, stats.num_emitted_tokens) == (12, 12)
    assert len(steps.learnt) == 1, "the first one: of the second and of those that are skipped no time was taken"


@pytest.mark.parametrize(
    "step",
    [
        step_of({"a": 1, "c": 1}, {}),
        step_of({"a": 1}, {}, finished=("b",)),
        step_of({"a": 1, "b": 1, "c": 1}, {}, new=("c",)),
        step_of({"a": 1, "b": 1}, {}, new=("b",)),
        step_of({"a": 1, "b": 2}, {"b": [7]}),
        step_of({"a": 1, "b": 9}, {}),
    ],
    ids=["another", "one less", "a new one", "a new one of the same name", "drafts", "tokens computed again"],
)
def test_a_step_that_is_not_of_the_same_requests_is_decided_anew(
    step: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    steps.runner._budget.skip_steps = lambda batch_size, num_sampled: 3
    steps.run(step_of({"a": 1, "b": 1}, {}))
    steps.runner._budget.skip_steps = lambda batch_size, num_sampled: 0
    steps.noted.clear()

    steps.run(step)
    num_asked = len(steps.asked)
    steps.run(step_of({"a": 1, "b": 1}, {}))

    assert len(steps.asked) == num_asked + 1, "what was to be skipped is forgotten"
    is_plain = not step.scheduled_new_reqs and set(step.num_scheduled_tokens.values()) == {1}
    assert num_asked == 1 + is_plain


def test_as_long_as_a_request_that_was_preempted_runs_steps_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    plain = step_of({"a": 1, "b": 1}, {})
    steps.run(step_of({"a": 1, "b": 1}, {}, resumed=("b",)))

    # its next token, or one more that it had before
    assert steps.run(plain) == [TreeModelRunner] * 2

    assert steps.run(step_of({"a": 1, "c": 1}, {}, finished=("b",))) == [CPUModelRunner] * 2
    assert steps.run(plain) == [CPUModelRunner] * 2


@pytest.mark.parametrize("is_automatic", [False, True])
def test_steps_behind_which_drafts_are_wanted_are_ours(monkeypatch: pytest.MonkeyPatch, is_automatic: bool) -> None:
    steps = Steps(monkeypatch, is_automatic=is_automatic, drafts=True)

    assert steps.run(step_of({"a": 1, "b": 1}, {})) == [TreeModelRunner] * 2

    assert steps.runner._floor == (-1.0 if is_automatic else -math.inf)


def test_where_nothing_is_drafted_vllm_is_told_of_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.runner._floor = None

    def propose(tokens: list[list[int]]) -> list[list[int]]:
        return steps.runner.propose_draft_token_ids(None, tokens, None, torch.zeros(2, 1), torch.zeros(2, 1), None)

    assert propose([[], []]) == [], "all are in the middle of their prompts"
    assert propose([[], [7]]) == []

    assert steps.asked == [1]
    assert steps.runner.stats.num_skipped_drafts == 1


def test_whether_to_draft_is_asked_of_so_many_requests_of_which_so_many_are_sampled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = Steps(monkeypatch)
    asked: list[tuple[str, int, int]] = []
    for name in ("should_draft", "wants_plain_step", "skip_steps"):
        setattr(steps.runner._budget, name, lambda *numbers, name=name: asked.append((name, *numbers)))
    sampled = SimpleNamespace(sampling_params=SamplingParams(temperature=1))
    steps.runner.requests = steps.runner.requests | {"b": sampled, "c": sampled}
    three = step_of({"a": 1, "b": 1, "c": 1}, {}, num_outputs=(3, 5, 7))

    steps.run(three)
    steps.runner._budget.wants_plain_step = lambda *numbers: True
    steps.run(three)

    assert asked == [("should_draft", 3, 2), ("skip_steps", 3, 2)] * 2
    assert [step.num_sampled for step in steps.learnt] == [2]


def test_what_was_decided_before_a_step_is_not_decided_again_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, drafts=True)
    runner, floors = steps.runner, []
    runner._budget.choose = lambda trees, chains, greedy: Choice([0], as_chains=False)
    runner._has_foresight, runner._last_rows, runner._proposed = False, [0, 1], {}
    runner.drafter = SimpleNamespace(
        search=lambda hidden, init_ids, floor, foresight: (floors.append(floor), CANDIDATES)[1],
        trees=lambda candidates, budgets, linear: [tree_of([])],
    )
    steps.run(step_of({"a": 1, "b": 1}, {}))

    runner.propose_draft_token_ids(None, [[], [7]], None, torch.zeros(2, 1), torch.zeros(2, 1), None)

    assert steps.asked == [2]
    assert floors == [-1.0], "that of the two requests of the step"


def test_nodes_stand_at_the_positions_of_their_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUModelRunner, "_prepare_inputs", lambda self, output, counts: "what vLLM returns")
    tree = tree_of([(1, 2), (3,)])
    runner = object.__new__(TreeModelRunner)
    runner._proposed, runner.stats = {"b": tree, "c": tree}, Stats()
    runner.input_batch = SimpleNamespace(req_ids=["a", "b", "c", "d"])
    output = step_of({"a": 3, "b": 4, "c": 2, "d": 1}, {"b": tree.token_ids, "c": tree.token_ids[:1]})
    linear = [0, 1, 2, 40, 41, 42, 43, 70, 71, 90]
    runner.positions = torch.tensor([*linear, 5])

    assert runner._prepare_inputs(output, np.array([3, 4, 2, 1])) == "what vLLM returns"

    assert runner.positions.tolist() == [0, 1, 2, 40, 41, 42, 41, 70, 71, 90, 5]
    assert runner._proposed == {}
