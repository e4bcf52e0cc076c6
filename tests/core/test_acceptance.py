from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tests.core import naive
from tests.core.test_token_tree import PAPER_BEAMS, PAPER_SCORES, ROOT, beam_cases, budgets, tree_of
from vllm_redrafter.core.acceptance import Walk, greedy_walk, walk
from vllm_redrafter.core.token_tree import TokenTree, best_nodes, chain, merge

VOCAB = 4
NUM_TOKENS = 3
NUM_SAMPLES = 200_000
P_VALUE = 1e-4


def emitted(result: Walk, row: int) -> naive.Prefix:
    return tuple(token_id for token_id in result.token_ids[row].tolist() if token_id >= 0)


def accepted_nodes(result: Walk, row: int) -> list[int]:
    return [node for node in result.nodes[row].tolist() if node >= 0]


def test_the_worked_example_accepts_the_beam_that_the_target_follows() -> None:
    beams = torch.tensor([PAPER_BEAMS])
    log_probs = torch.tensor([[[PAPER_SCORES[tuple(beam[: i + 1])] for i in range(3)] for beam in PAPER_BEAMS]])
    tree = best_nodes(torch.tensor([ROOT]), merge(beams, log_probs), 9)
    choices = torch.full((1, 10), 99)
    after = {prefix: node for node, prefix in enumerate(naive.prefixes(tree))}
    for prefix, token_id in {(): 1, (1,): 2, (1, 2): 6, (1, 2, 6): 11}.items():
        choices[0, after[prefix]] = token_id

    result = greedy_walk(tree, choices)

    assert result.token_ids.tolist() == [[1, 2, 6, 11]]
    assert result.nodes.tolist() == [[0, 1, 2, 4]]
    assert result.num_accepted.tolist() == [3]


def test_a_token_that_stands_elsewhere_in_the_tree_is_not_accepted() -> None:
    result = greedy_walk(chain(torch.tensor([[7, 1, 2, 3]])), torch.tensor([[2, 99, 99, 99]]))

    assert result.token_ids.tolist() == [[2]]
    assert result.nodes.tolist() == [[0]]


@settings(deadline=None, max_examples=150)
@given(beam_cases, budgets, st.integers(0, 2**32 - 1))
def test_a_greedy_walk_is_the_longest_path_that_the_target_follows(
    case: tuple[int, int, int, int, int], budget: int, seed: int
) -> None:
    tree, beams, _ = tree_of(case, budget)
    vocab = case[3]
    choices = torch.from_numpy(np.random.default_rng(seed).integers(vocab, size=tree.token_ids.shape))

    result = greedy_walk(tree, choices)

    for row in range(len(beams)):
        nodes = naive.prefixes(tree, row)
        chosen = dict(zip(nodes, choices[row].tolist(), strict=False))
        expected = naive.accept(nodes, lambda prefix, chosen=chosen: chosen[prefix])
        assert emitted(result, row) == expected
        assert int(result.num_accepted[row]) == len(expected) - 1
        assert [nodes[node] for node in accepted_nodes(result, row)] == [expected[:i] for i in range(len(expected))]


def test_the_target_is_asked_once_per_depth_and_at_the_node_reached() -> None:
    tree = chain(torch.tensor([[7, 1, 2, 3], [7, 4, 5, 6]]))
    asked: list[list[int]] = []
    answers = iter([torch.tensor([1, 4]), torch.tensor([2, 9]), torch.tensor([8, 5])])

    def draw(nodes: torch.Tensor) -> torch.Tensor:
        asked.append(nodes.tolist())
        return next(answers)

    result = walk(tree, draw)

    # the second row ended a depth before, at node 1: what is drawn for it afterwards counts for nothing
    assert asked == [[0, 0], [1, 1], [2, 1]]
    assert result.token_ids.tolist() == [[1, 2, 8], [4, 9, -1]]
    assert result.nodes.tolist() == [[0, 1, 2], [0, 1, -1]]
    assert result.num_accepted.tolist() == [2, 1]


def test_a_tree_of_the_root_alone_emits_one_token() -> None:
    result = greedy_walk(chain(torch.tensor([[7], [8]])), torch.tensor([[1], [2]]))

    assert result.token_ids.tolist() == [[1], [2]]
    assert result.num_accepted.tolist() == [0, 0]


def test_padding_is_never_walked_into() -> None:
    tree = chain(torch.tensor([[7, 1, 9]]))
    padded = tree._replace(parents=torch.tensor([[-1, 0, -1]]), num_nodes=torch.tensor([1]))

    assert greedy_walk(padded, torch.full((1, 3), 9)).token_ids.tolist() == [[9]]


class Model:
    """A language model of 4 tokens, whose next token depends on all that came before."""

    def __init__(self, seed: int, sharpness: float) -> None:
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(VOCAB ** (NUM_TOKENS + 2), VOCAB)) * sharpness
        # a floor under every probability: chi-square wants some of every outcome
        self.table = 0.9 * np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) + 0.1 / VOCAB

    @staticmethod
    def index(prefix: naive.Prefix) -> int:
        number = 1
        for token_id in prefix:
            number = number * VOCAB + token_id
        return number

    def __call__(self, prefix: naive.Prefix) -> np.ndarray:
        return self.table[self.index(prefix)]

    def complete(self, emitted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return rows of NUM_TOKENS tokens: those emitted, [rows, any], where not -1, and draws of the model."""
        rows = np.full((len(emitted), NUM_TOKENS), -1)
        rows[:, : emitted.shape[1]] = emitted[:, :NUM_TOKENS]
        number = np.ones(len(rows), dtype=int)
        for i in range(NUM_TOKENS):
            drawn = (rng.random((len(rows), 1)) > self.table[number].cumsum(axis=1)[:, :-1]).sum(axis=1)
            rows[:, i] = np.where(rows[:, i] < 0, drawn, rows[:, i])
            number = number * VOCAB + rows[:, i]
        return rows

    def p_value(self, rows: np.ndarray) -> float:
        """Return how well rows of tokens fit this model's joint distribution."""
        outcomes = [tuple(outcome) for outcome in np.ndindex(*[VOCAB] * NUM_TOKENS)]
        exact = np.array([np.prod([self(o[:i])[o[i]] for i in range(NUM_TOKENS)]) for o in outcomes])
        counts = np.bincount(rows @ [VOCAB**2, VOCAB, 1], minlength=VOCAB**NUM_TOKENS)
        assert (exact * len(rows)).min() > 5
        return float(chisquare(counts, exact * len(rows)).pvalue)


TARGET = Model(seed=1, sharpness=1.0)
DRAFTS = {
    "Q = P": TARGET,
    "Q far from P": Model(seed=2, sharpness=3.0),
    "Q uniform but for noise": Model(seed=3, sharpness=0.01),
}


def beams_of(draft: Model, width: int, length: int) -> np.ndarray:
    found = naive.beam_search(lambda prefix: np.log(draft(prefix)), width, length)
    return np.array(list(found.candidates[-1]))


def tree_of_beams(beams: np.ndarray) -> TokenTree:
    """Return the tree of all prefixes of the beams, duplicates merged."""
    scores = -torch.arange(1.0, 1 + beams.shape[1]).expand(1, *beams.shape)
    return best_nodes(torch.tensor([ROOT]), merge(torch.from_numpy(beams)[None], scores), 63)


def sampled_walk(tree: TokenTree, generator: torch.Generator) -> Walk:
    """Return NUM_SAMPLES walks down one tree, with tokens drawn from the target."""
    probs = torch.from_numpy(np.stack([TARGET(prefix) for prefix in naive.prefixes(tree)]))
    many = TokenTree(*(column.expand(NUM_SAMPLES, *column.shape[1:]) for column in tree))
    thresholds = probs.cumsum(dim=1)[:, :-1]

    def draw(nodes: torch.Tensor) -> torch.Tensor:
        return (torch.rand(NUM_SAMPLES, 1, generator=generator) > thresholds[nodes]).sum(dim=1)

    return walk(many, draw)


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("draft", DRAFTS)
def test_sampled_tokens_have_exactly_the_targets_distribution(draft: str, width: int, length: int) -> None:
    tree = tree_of_beams(beams_of(DRAFTS[draft], width, length))

    result = sampled_walk(tree, torch.Generator().manual_seed(width))

    rows = TARGET.complete(result.token_ids.numpy(), np.random.default_rng(length))
    assert TARGET.p_value(rows) > P_VALUE
    assert 0 < float(result.num_accepted.double().mean()) < length


def test_duplicate_beams_do_not_change_the_distribution() -> None:
    beams = beams_of(TARGET, 2, 2)
    tree = tree_of_beams(np.concatenate([beams] * 8 + [beams[:1]] * 20))

    result = sampled_walk(tree, torch.Generator().manual_seed(0))

    assert int(tree.num_nodes) == int(tree_of_beams(beams).num_nodes)
    assert TARGET.p_value(TARGET.complete(result.token_ids.numpy(), np.random.default_rng(0))) > P_VALUE


def test_the_drafts_accepted_are_as_many_as_the_target_gives_their_paths_probability() -> None:
    tree = tree_of_beams(beams_of(TARGET, 4, 3))

    mean = float(sampled_walk(tree, torch.Generator().manual_seed(0)).num_accepted.double().mean())

    paths = naive.prefixes(tree)[1:]
    expected = sum(np.prod([TARGET(path[:i])[path[i]] for i in range(len(path))]) for path in paths)
    # five standard errors; the number accepted lies within 0..3
    assert mean == pytest.approx(expected, abs=5 * 1.5 / NUM_SAMPLES**0.5)


def test_autoregressive_samples_pass_the_same_chi_square() -> None:
    rows = TARGET.complete(np.full((NUM_SAMPLES, 1), -1), np.random.default_rng(0))

    assert TARGET.p_value(rows) > P_VALUE


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("draft", DRAFTS)
def test_apples_ratio_rule_fails_the_same_chi_square(draft: str, width: int) -> None:
    rng = np.random.default_rng(0)
    beams = beams_of(DRAFTS[draft], width, 2)

    emitted = naive.apple_accept(beams, TARGET, DRAFTS[draft], NUM_SAMPLES, rng)

    padded = np.array([(*tokens, *[-1] * (NUM_TOKENS - len(tokens))) for tokens in emitted])
    assert TARGET.p_value(TARGET.complete(padded, rng)) < P_VALUE


def test_a_sampler_that_is_one_percent_off_fails_the_same_chi_square() -> None:
    rows = TARGET.complete(np.full((NUM_SAMPLES, 1), -1), np.random.default_rng(0))
    rows[: NUM_SAMPLES // 100, 0] = 0

    assert TARGET.p_value(rows) < P_VALUE
