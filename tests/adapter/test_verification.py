from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from vllm import SamplingParams
from vllm.sampling_params import SamplingType
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from tests.adapter.trees import draft_tree, prefixes, random_tree, tree_of
from tests.core import naive
from tests.core.naive import Prefix
from vllm_redrafter.adapter.tree_batch import DraftTree, TreeBatch, assemble, chain_of
from vllm_redrafter.adapter.verification import Verifier, Walk, is_plain_greedy, walk
from vllm_redrafter.core import acceptance

VOCAB = 12
FORBIDDEN_PAIRS = [[a, b] for a in range(VOCAB) for b in range(VOCAB) if (a + b) % 3 == 0]
CPU = torch.device("cpu")


def target(request: int, prefix: Prefix) -> torch.Tensor:
    """Return the target's logits after a prefix of emitted tokens, [vocab]: fixed, and different for every prefix."""
    generator = torch.Generator().manual_seed(hash((request, prefix)) % 2**31)
    return 2.0 * torch.randn(VOCAB, generator=generator)


@dataclass
class Case:
    """A request: what it asks for, and what it has emitted before this step."""

    parameters: SamplingParams
    bad_words: list[list[int]] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)

    def state(self, name: str) -> CachedRequestState:
        """Return the request as vLLM's runner keeps it: with lists and a generator of its own."""
        parameters = self.parameters.clone()
        parameters._bad_words_token_ids = self.bad_words or None
        generator = None
        if parameters.sampling_type == SamplingType.RANDOM_SEED:
            generator = torch.Generator().manual_seed(parameters.seed)
        prompt = [1, 2, 3]
        return CachedRequestState(name, prompt, [], parameters, generator, ([],), 0, list(self.emitted))


CASES = {
    "greedy": Case(SamplingParams(temperature=0)),
    "seeded": Case(SamplingParams(temperature=1.0, seed=5)),
    "seeded, cool and truncated": Case(SamplingParams(temperature=0.7, seed=6, top_p=0.9, top_k=8)),
    "min_p": Case(SamplingParams(temperature=1.3, seed=7, min_p=0.2)),
    "logit_bias": Case(SamplingParams(temperature=0, logit_bias={4: 3.0, 7: -100.0})),
    "logit_bias, seeded": Case(SamplingParams(temperature=1.0, seed=8, logit_bias={4: 3.0, 7: -100.0})),
    "penalties": Case(
        SamplingParams(temperature=0, repetition_penalty=1.6, frequency_penalty=0.9, presence_penalty=0.8),
        emitted=[4, 4, 6],
    ),
    "penalties, seeded": Case(
        SamplingParams(temperature=1.0, seed=9, repetition_penalty=1.6, frequency_penalty=1.5, presence_penalty=1.0)
    ),
    "bad words": Case(SamplingParams(temperature=0), bad_words=[[3], [8, 9, 2], *FORBIDDEN_PAIRS], emitted=[8]),
    "bad words, seeded": Case(SamplingParams(temperature=1.5, seed=10), bad_words=[[0], *FORBIDDEN_PAIRS]),
    "min_tokens": Case(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[0, 1, 2, 3, 4, 5])),
    "min_tokens, seeded": Case(
        SamplingParams(temperature=1.0, seed=11, min_tokens=5, stop_token_ids=[1, 3, 5, 7]), emitted=[6, 6]
    ),
    "allowed tokens": Case(SamplingParams(temperature=0, allowed_token_ids=[2, 5, 8])),
    "allowed tokens, seeded": Case(SamplingParams(temperature=1.0, seed=12, allowed_token_ids=[2, 5, 8])),
    "logprobs": Case(SamplingParams(temperature=0, logprobs=3)),
    "logprobs, seeded": Case(SamplingParams(temperature=1.0, seed=13, logprobs=0)),
}


def input_batch(states: Sequence[CachedRequestState]) -> InputBatch:
    """Return vLLM's own batch of some requests, with the logits processors that our runner installs."""
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=len(states)))
    kinds = (MinPLogitsProcessor, LogitBiasLogitsProcessor, MinTokensLogitsProcessor)
    batch = InputBatch(
        max_num_reqs=len(states),
        max_model_len=64,
        max_num_batched_tokens=64 * len(states),
        device=CPU,
        vocab_size=VOCAB,
        block_sizes=[32],
        max_num_blocks_per_req=[2],
        logitsprocs=LogitsProcessors(kind(config, CPU, False) for kind in kinds),
        num_spec_tokens=8,
    )
    for state in states:
        batch.add_request(state)
    batch.refresh_metadata()
    return batch


def autoregressive(case: Case, request: int, num_tokens: int) -> tuple[Prefix, list[LogprobsTensors | None], Any]:
    """Return what vLLM emits for a request alone, without speculation: tokens, logprobs, and the used generator."""
    state = case.state("alone")
    batch = input_batch([state])
    tokens: Prefix = ()
    logprobs = []
    for _ in range(num_tokens):
        batch.refresh_metadata()
        output = Sampler()(target(request, tokens)[None].clone(), batch.sampling_metadata)
        logprobs.append(output.logprobs_tensors)
        tokens = (*tokens, int(output.sampled_token_ids))
        state.output_token_ids.append(tokens[-1])
    return tokens, logprobs, state.generator


def tree_around(tokens: Prefix, depth: int, rng: np.random.Generator) -> DraftTree:
    """Return a tree that holds the first `depth` of some tokens, not on its first path, among random others."""
    others = [(*tokens[: int(at)], *rng.integers(VOCAB, size=2).tolist()) for at in rng.integers(depth + 1, size=4)]
    wrong = int(tokens[0] + 1) % VOCAB
    return tree_of([(wrong, wrong), tokens[:depth], *others])


class Step:
    """A verification of one tree per request."""

    def __init__(self, cases: Sequence[Case], trees: Sequence[DraftTree], requests: Sequence[int]) -> None:
        self.states = [case.state(str(index)) for index, case in enumerate(cases)]
        self.inputs = input_batch(self.states)
        names = self.inputs.req_ids
        scheduled = {name: tree.token_ids for name, tree in zip(names, trees, strict=True) if tree.token_ids}
        ends = np.cumsum([1 + len(tree.token_ids) for tree in trees]).tolist()
        self.batch = assemble(dict(zip(names, trees, strict=True)), names, scheduled, ends)
        self.nodes = [prefixes(tree) for tree in trees]
        self.logits = torch.stack(
            [target(request, node) for request, nodes in zip(requests, self.nodes, strict=True) for node in nodes]
        )

    def verify(self, discarded: frozenset[int] = frozenset(), sampler: Any = None) -> tuple[SamplerOutput, Walk]:
        return Verifier(sampler or Sampler()).verify(
            self.batch, self.logits, self.inputs.sampling_metadata, self.inputs.req_output_token_ids, discarded
        )


def emitted(walked: Walk) -> list[Prefix]:
    return [tuple(tokens) for tokens in walked.tokens]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_walk_on_lists_is_the_cores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, 12, 5, 4) for _ in range(4)]
    drafts = [draft_tree(tree) for tree in trees]
    choices = rng.integers(5, size=(4, 13))

    walked = walk(drafts, lambda at: choices[range(4), at].tolist())

    for row, tree in enumerate(trees):
        expected = acceptance.greedy_walk(tree, torch.from_numpy(choices[row : row + 1]))
        end = int(expected.num_accepted) + 1
        assert walked.tokens[row] == expected.token_ids[0, :end].tolist()
        assert walked.nodes[row] == expected.nodes[0, :end].tolist()


def test_a_mixed_batch_emits_what_every_request_would_emit_alone_without_speculation() -> None:
    rng = np.random.default_rng(0)
    cases = list(CASES.values())
    depths = [index % 5 for index in range(len(cases))]
    plain = [autoregressive(case, request, 9)[0] for request, case in enumerate(cases)]
    trees = [
        tree_around(tokens, depth, rng) if depth else chain_of([]) for tokens, depth in zip(plain, depths, strict=True)
    ]
    step = Step(cases, trees, range(len(cases)))

    output, walked = step.verify()

    rows = output.sampled_token_ids.tolist()
    assert [[token for token in row if token >= 0] for row in rows] == walked.tokens
    assert all(row == sorted(row, key=lambda token: token < 0) for row in rows), "padding stands at the end"
    for tokens, expected, depth, nodes in zip(emitted(walked), plain, depths, step.nodes, strict=True):
        assert len(tokens) > depth
        assert tokens == expected[: len(tokens)]
        assert tokens == naive.accept(nodes, lambda prefix, expected=expected: expected[len(prefix)])
    assert max(len(tokens) for tokens in emitted(walked)) >= 5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("depth", [1, 3, 5])
def test_each_option_sees_exactly_the_accepted_prefix_and_draws_once_per_token(name: str, depth: int) -> None:
    case = CASES[name]
    plain, _, _ = autoregressive(case, 77, depth + 3)
    # a request beside it keeps the walk going when this one has ended
    beside, _, _ = autoregressive(CASES["seeded"], 78, 8)
    trees = [tree_around(plain, depth, np.random.default_rng(depth)), tree_of([beside[:7]])]
    step = Step([case, CASES["seeded"]], trees, [77, 78])

    tokens = emitted(step.verify()[1])

    assert tokens[0] == plain[: len(tokens[0])]
    assert len(tokens[0]) > depth
    assert len(tokens[1]) == 8
    for index, (each, request) in enumerate(((case, 77), (CASES["seeded"], 78))):
        assert step.states[index].output_token_ids == each.emitted, "vLLM appends the tokens itself"
        generator = autoregressive(each, request, len(tokens[index]))[2]
        if generator is not None:
            assert torch.equal(step.states[index].generator.get_state(), generator.get_state())


@pytest.mark.parametrize("name", ["penalties", "bad words", "min_tokens", "penalties, seeded"])
def test_a_walk_that_hides_accepted_tokens_from_the_sampler_is_noticed(name: str) -> None:
    # what the options say about the prefix decides in these cases: else the test above would show nothing
    differences = 0
    for request in range(40):
        plain, _, _ = autoregressive(CASES[name], request, 5)
        step = Step([CASES[name]], [tree_of([plain[:4]])], [request])
        step.inputs.req_output_token_ids = [[]]  # the lists that the walk appends to are not those the options read
        differences += emitted(step.verify()[1])[0] != plain

    assert differences > 5


@pytest.mark.parametrize("num_drafts", [0, 3], ids=["beside plain decoding", "beside drafts"])
def test_requests_in_the_middle_of_their_prompt_draw_nothing(num_drafts: int) -> None:
    cases = [CASES["seeded"], CASES["min_p"], CASES["seeded"]]
    plain, _, _ = autoregressive(cases[1], 1, 1 + num_drafts)
    step = Step(cases, [chain_of([]), chain_of(list(plain[:num_drafts])), chain_of([])], [0, 1, 2])
    before = [state.generator.get_state() for state in step.states]

    walked = step.verify(discarded=frozenset({0, 2}))[1]

    assert emitted(walked)[1] == plain
    for index in (0, 2):
        assert torch.equal(step.states[index].generator.get_state(), before[index])
        assert step.states[index].output_token_ids == []
    assert step.inputs.sampling_metadata.generators.keys() == {0, 1, 2}, "vLLM's own record is left as it was"


def test_logprobs_stand_in_the_order_of_the_walk_and_equal_those_without_speculation() -> None:
    cases = [
        Case(SamplingParams(temperature=0, logprobs=3)),
        Case(SamplingParams(temperature=1.0, seed=3, logprobs=2, presence_penalty=0.5)),
        Case(SamplingParams(temperature=1.0, seed=4)),
    ]
    plain = [autoregressive(case, request, 5) for request, case in enumerate(cases)]
    trees = [tree_around(plain[index][0], depth, np.random.default_rng(9)) for index, depth in enumerate((2, 4, 1))]

    output, walked = Step(cases, trees, range(3)).verify()

    width = output.sampled_token_ids.shape[1]
    logprobs = output.logprobs_tensors
    assert logprobs is not None
    assert len(logprobs.logprobs) == 3 * width
    for index, tokens in enumerate(emitted(walked)[:2]):
        for depth, token in enumerate(tokens):
            alone = plain[index][1][depth]
            assert alone is not None
            count = alone.logprobs.shape[1]  # in the batch the request with the most logprobs sets the number
            row = index * width + depth
            assert int(logprobs.logprob_token_ids[row, 0]) == token
            assert torch.equal(logprobs.logprob_token_ids[row, :count], alone.logprob_token_ids[0])
            assert torch.equal(logprobs.logprobs[row, :count], alone.logprobs[0])
            assert int(logprobs.selected_token_ranks[row]) == int(alone.selected_token_ranks[0])


@pytest.mark.parametrize("seed", range(20))
def test_the_fast_path_of_greedy_batches_equals_the_slow_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    cases = [CASES["greedy"]] * 5
    plain = [autoregressive(case, 10 * seed + index, 5)[0] for index, case in enumerate(cases)]
    trees = [tree_around(tokens, int(rng.integers(1, 5)), rng) for tokens in plain[:-1]] + [chain_of([-1, -1])]
    step = Step(cases, trees, range(10 * seed, 10 * seed + 5))
    assert is_plain_greedy(step.inputs.sampling_metadata)
    fast = step.verify()
    monkeypatch.setattr("vllm_redrafter.adapter.verification.is_plain_greedy", lambda metadata: False)

    slow = step.verify()

    assert fast[1] == slow[1]
    assert torch.equal(fast[0].sampled_token_ids, slow[0].sampled_token_ids)
    assert fast[0].sampled_token_ids.dtype == slow[0].sampled_token_ids.dtype == torch.int32
    assert fast[0].logprobs_tensors is None


def test_the_fast_path_calls_no_sampler_and_leaves_the_logits_alone() -> None:
    step = Step([CASES["greedy"]], [tree_of([(1, 2), (3,)])], [0])
    before = step.logits.clone()
    only_greedy = SimpleNamespace(greedy_sample=Sampler.greedy_sample)

    step.verify(sampler=only_greedy)

    assert torch.equal(step.logits, before)


@pytest.mark.parametrize("names", [["greedy", "greedy"], ["greedy", "seeded"], ["penalties, seeded", "logprobs"]])
def test_a_batch_without_drafts_emits_one_token_each_as_plain_decoding_does(names: list[str]) -> None:
    cases = [CASES[name] for name in names]
    plain = [autoregressive(case, request, 1) for request, case in enumerate(cases)]
    step = Step(cases, [chain_of([]), chain_of([])], range(2))

    output, walked = step.verify()

    assert emitted(walked) == [tokens for tokens, _, _ in plain]
    assert walked.nodes == [[0], [0]]
    assert output.sampled_token_ids.tolist() == walked.tokens
    assert output.sampled_token_ids.dtype == torch.int32
    for index, (_, logprobs, generator) in enumerate(plain):
        if logprobs[0] is not None:
            assert torch.equal(output.logprobs_tensors.logprobs[index, :1], logprobs[0].logprobs[0, :1])
        if generator is not None:
            assert torch.equal(step.states[index].generator.get_state(), generator.get_state())


def test_the_slow_path_leaves_the_logits_alone() -> None:
    step = Step([CASES["penalties, seeded"]], [tree_of([(1, 2), (3,)])], [0])
    before = step.logits.clone()

    step.verify()

    assert torch.equal(step.logits, before)


@pytest.mark.parametrize("name", [name for name in CASES if name != "greedy"])
def test_every_option_but_plain_greedy_takes_the_slow_path(name: str) -> None:
    inputs = input_batch([CASES["greedy"].state("0"), CASES[name].state("1")])

    assert not is_plain_greedy(inputs.sampling_metadata)


def test_min_tokens_that_are_reached_leave_the_fast_path_open() -> None:
    case = Case(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[1]), emitted=[5, 6])

    assert is_plain_greedy(input_batch([case.state("0")]).sampling_metadata)


def test_a_logits_processor_that_we_do_not_know_takes_the_slow_path() -> None:
    metadata = input_batch([CASES["greedy"].state("0")]).sampling_metadata
    unknown = SimpleNamespace(is_argmax_invariant=lambda: False)
    metadata.logitsprocs = LogitsProcessors([unknown])

    assert not is_plain_greedy(metadata)


def test_bfloat16_logits_are_sampled_as_without_speculation() -> None:
    plain: Prefix = ()
    for _ in range(3):
        plain = (*plain, int(Sampler.greedy_sample(target(5, plain).bfloat16()[None].float())))
    step = Step([CASES["greedy"]], [tree_of([(0,), plain[:2]])], [5])
    step.logits = step.logits.bfloat16()

    assert emitted(step.verify()[1]) == [plain]


# the distribution of what is emitted

NUM_SAMPLES = 100_000
SMALL_VOCAB = 6
SHAPE = tree_of([(0, 0, 1), (0, 0, 2), (0, 3), (1, 0), (1, 1), (4,)])
NODES = prefixes(SHAPE)


def small_target(prefix: Prefix) -> torch.Tensor:
    """Return logits under which drafts are probable enough for every path to be walked often, [vocab]."""
    generator = torch.Generator().manual_seed(hash(prefix) % 2**31)
    is_draft = torch.tensor([(*prefix, token) in NODES for token in range(SMALL_VOCAB)])
    return 0.5 * torch.randn(SMALL_VOCAB, generator=generator) + 1.0 * is_draft


def many(temperature: float, top_k: int | None, top_p: float | None, min_p: float) -> SamplingMetadata:
    """Return the metadata of NUM_SAMPLES unseeded requests that ask for the same."""
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=NUM_SAMPLES))
    processor = MinPLogitsProcessor(config, CPU, False)
    if min_p:
        processor.min_p_count = NUM_SAMPLES
        processor.min_p = torch.full((NUM_SAMPLES, 1), min_p)
    nothing = torch.zeros(NUM_SAMPLES)
    return SamplingMetadata(
        temperature=torch.full((NUM_SAMPLES,), temperature),
        all_greedy=False,
        all_random=True,
        top_p=None if top_p is None else torch.full((NUM_SAMPLES,), top_p),
        top_k=None if top_k is None else torch.full((NUM_SAMPLES,), top_k),
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors([processor]),
    )


def exact_distribution(prefix: Prefix, temperature: float, top_k: int | None, top_p: float | None, min_p: float) -> Any:
    """Return the probabilities of the next token, [vocab], by the definitions of the options."""
    probabilities = (small_target(prefix).double() / temperature).softmax(dim=-1).numpy()
    probabilities = np.where(probabilities < min_p * probabilities.max(), 0.0, probabilities)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    if top_k is not None:
        probabilities[order[top_k:]] = 0.0
        probabilities /= probabilities.sum()
    if top_p is not None:
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= top_p]] = 0.0
        probabilities /= probabilities.sum()
    return probabilities


def chi_square(sequences: Sequence[Prefix], options: tuple[Any, ...]) -> float:
    """Return the p-value of emitted sequences against the exact distribution of those that the tree can yield."""
    exact: dict[Prefix, float] = {}
    reached = {(): 1.0}
    for node in NODES:
        for token, chance in enumerate(exact_distribution(node, *options)):
            child = (*node, token)
            (reached if child in NODES else exact)[child] = reached[node] * float(chance)
    assert sum(exact.values()) == pytest.approx(1.0)
    counts = Counter(sequences)
    assert all(exact[sequence] > 0 for sequence in counts), "nothing impossible was emitted"
    possible = [sequence for sequence, chance in exact.items() if chance > 0]
    expected = [len(sequences) * exact[sequence] for sequence in possible]
    assert min(expected) > 5
    return float(stats.chisquare([counts[sequence] for sequence in possible], expected).pvalue)


OPTIONS = {
    "T=1": (1.0, None, None, 0.0),
    "T=0.7, top_k 5, top_p 0.95": (0.7, 5, 0.95, 0.0),
    "T=1.3, min_p 0.3": (1.3, None, None, 0.3),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_walks_and_plain_sampling_both_have_the_exact_distribution(options: tuple[Any, ...]) -> None:
    rows = list(range(0, NUM_SAMPLES * len(NODES), len(NODES)))
    batch = TreeBatch([SHAPE] * NUM_SAMPLES, rows, rows, NUM_SAMPLES * len(SHAPE.token_ids), NUM_SAMPLES, 0, 0)
    table = torch.stack([small_target(node) for node in NODES])
    outputs: list[list[int]] = [[] for _ in range(NUM_SAMPLES)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        verifier = Verifier(Sampler())
        _, walked = verifier.verify(batch, table.repeat(NUM_SAMPLES, 1), many(*options), outputs, frozenset())
        control = plain_samples(table, options)

    lengths = {len(nodes) for nodes in walked.nodes}
    assert lengths == set(range(1, 2 + max(SHAPE.depths))), "walks of every length are among them"
    assert chi_square(control, options) > 1e-4
    assert chi_square(emitted(walked), options) > 1e-4
    assert not any(outputs)


def plain_samples(table: torch.Tensor, options: tuple[Any, ...]) -> list[Prefix]:
    """Return what the same sampler yields one token at a time, until what it has emitted is not in the tree."""
    index_of = {node: index for index, node in enumerate(NODES)}
    samples: list[Prefix] = [()] * NUM_SAMPLES
    for _ in range(1 + max(SHAPE.depths)):
        at = torch.tensor([index_of.get(sample, 0) for sample in samples])
        tokens = Sampler()(table[at], many(*options)).sampled_token_ids[:, 0].tolist()
        samples = [
            (*sample, token) if sample in index_of else sample for sample, token in zip(samples, tokens, strict=True)
        ]
    return samples


def test_the_chi_square_notices_a_token_that_comes_up_a_twentieth_too_seldom() -> None:
    rng = np.random.default_rng(0)
    tables = {node: exact_distribution(node, *OPTIONS["T=1"]) for node in NODES}
    tables[()] = tables[()] * np.array([1.0, 0.95, 1.0, 1.0, 1.0, 1.0])
    cumulative = {node: np.cumsum(table / table.sum()) for node, table in tables.items()}
    samples = []
    for draws in rng.random((NUM_SAMPLES, 1 + max(SHAPE.depths))):
        sample: Prefix = ()
        while sample in cumulative:
            sample = (*sample, int(np.searchsorted(cumulative[sample], draws[len(sample)])))
        samples.append(sample)

    assert chi_square(samples, OPTIONS["T=1"]) < 1e-4
