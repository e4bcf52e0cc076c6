from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vllm_redrafter.bench.tree_batches import random_parents
from vllm_redrafter.core.acceptance import Walk, greedy_walk
from vllm_redrafter.core.token_tree import TokenTree
from vllm_redrafter.kernels import reference

verify_walk = pytest.importorskip("vllm_redrafter.kernels.verify_walk", reason="needs Triton", exc_type=ImportError)


FIRST_SLOT = torch.zeros(1, dtype=torch.int32)


def random_trees(num_requests: int, num_nodes: int, vocab_size: int, seed: int = 0) -> TokenTree:
    """Returns trees over so few tokens that siblings' children, and now and then siblings, carry the same ones."""
    generator = torch.Generator().manual_seed(seed)
    parents = torch.tensor([random_parents(1 + num_nodes, generator) for _ in range(num_requests)])
    unused = torch.zeros_like(parents)
    return TokenTree(
        torch.randint(vocab_size, parents.shape, generator=generator), parents, unused, unused, unused[:, 0], unused
    )


def assert_walk(walk: Walk, expected: Walk) -> None:
    width = walk.token_ids.shape[1]
    padding = (0, width - expected.token_ids.shape[1])
    assert torch.equal(walk.token_ids, torch.nn.functional.pad(expected.token_ids, padding, value=-1))
    assert torch.equal(walk.nodes, torch.nn.functional.pad(expected.nodes, padding, value=-1))
    assert torch.equal(walk.num_accepted, expected.num_accepted)


@pytest.mark.parametrize("twin", [verify_walk, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("num_nodes", [0, 1, 7, 16, 63])
def test_the_walk_is_the_cores(num_nodes: int, twin: object) -> None:
    trees = random_trees(24, num_nodes, vocab_size=3)
    choices = torch.randint(3, trees.parents.shape, generator=torch.Generator().manual_seed(1))
    cu_num_logits = torch.arange(0, choices.numel() + 1, 1 + num_nodes, dtype=torch.int32)

    # request i's tree is in slot 23 - i
    slots = torch.arange(23, -1, -1, dtype=torch.int32)
    walk = twin.verify_walk(  # type: ignore[attr-defined]
        trees.token_ids.flatten(), trees.parents.flip(0), slots, cu_num_logits, choices.flatten()
    )

    expected = greedy_walk(trees, choices)
    assert num_nodes < 7 or expected.num_accepted.max() > 1
    assert_walk(walk, expected)


def test_a_chain_is_accepted_to_its_end() -> None:
    parents = torch.arange(-1, 63)[None]
    tokens = torch.arange(100, 164)[None]

    walk = verify_walk.verify_walk(
        tokens[0], parents, FIRST_SLOT, torch.tensor([0, 64], dtype=torch.int32), torch.arange(101, 165)
    )

    assert walk.token_ids.tolist() == [list(range(101, 165))]
    assert walk.nodes.tolist() == [list(range(64))]
    assert walk.num_accepted.tolist() == [63]


def test_trees_that_were_cut_off_are_walked_as_far_as_they_have_rows() -> None:
    parents = torch.tensor([[-1, 0, 1, 2, 0]])
    slots = torch.zeros(3, dtype=torch.int32)
    tokens = torch.tensor([7, 1, 2, 3, 9, 7, 1, 2])
    cu_num_logits = torch.tensor([0, 5, 5, 8], dtype=torch.int32)  # all rows, none, three
    choices = torch.tensor([1, 2, 3, 4, 0, 1, 2, 3])

    walks = [
        twin.verify_walk(tokens, parents, slots, cu_num_logits, choices)  # type: ignore[attr-defined]
        for twin in (verify_walk, reference)
    ]

    for walk in walks:
        assert walk.token_ids.tolist() == [[1, 2, 3, 4, -1], [-1] * 5, [1, 2, 3, -1, -1]]
        assert walk.nodes.tolist() == [[0, 1, 2, 3, -1], [-1] * 5, [0, 1, 2, -1, -1]]
        assert walk.num_accepted.tolist() == [3, -1, 2]


def test_nodes_of_padding_are_nobodys_children() -> None:
    tokens, parents = torch.tensor([7, 5, -1, -1]), torch.tensor([[-1, 0, -1, -1]])

    walk = verify_walk.verify_walk(
        tokens, parents, FIRST_SLOT, torch.tensor([0, 4], dtype=torch.int32), torch.tensor([5, 8, 1, 1])
    )

    assert walk.token_ids.tolist() == [[5, 8, -1, -1]]


def random_rows(vocab_size: int, num_rows: int = 6) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(num_rows, vocab_size, generator=generator)
    positions = torch.randint(1 << 20, (num_rows,), generator=generator)
    requests = torch.tensor([0, 1, 2, -1, 1, 2], dtype=torch.int32).repeat(num_rows // 6)
    return (
        logits,
        positions,
        requests,
        torch.tensor([0.0, 1.0, 0.3]),
        torch.tensor([5, -(1 << 62) + 3, 123456789012345]),
    )


@pytest.mark.parametrize("vocab_size", [1, 100, 2048, 5000])
def test_tokens_are_the_twins(vocab_size: int) -> None:
    rows = random_rows(vocab_size)

    assert torch.equal(verify_walk.target_tokens(*rows), reference.target_tokens(*rows))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM, whose draws are compared with")
def test_tokens_are_those_of_vllm(tmp_path: Path) -> None:
    rows = random_rows(20000, num_rows=60)
    torch.save(rows, tmp_path / "rows.pt")

    command = [sys.executable, Path(__file__).with_name("vllm_draws.py"), tmp_path / "rows.pt", tmp_path / "tokens.pt"]
    result = subprocess.run(command, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    assert torch.equal(verify_walk.target_tokens(*rows), torch.load(tmp_path / "tokens.pt"))


def test_temperature_0_and_padding_are_greedy_and_the_first_of_equals_wins() -> None:
    logits, positions, requests, temperatures, seeds = random_rows(5000)
    logits[0, [4000, 17, 3000]] = 9.0
    logits[3, [4999, 4001]] = 9.0

    tokens = verify_walk.target_tokens(logits, positions, requests, temperatures, seeds)

    assert tokens[0] == 17
    assert tokens[3] == 4001


def test_noise_belongs_to_seed_position_and_token() -> None:
    flat = torch.zeros(6, 3000)
    positions = torch.tensor([10, 10, 11, 10, 10, 10])
    requests = torch.tensor([0, 0, 0, 1, 2, 0], dtype=torch.int32)
    seeds = torch.tensor([5, 6, 5 + (1 << 32)])
    flat[5, ::2] = float("-inf")

    tokens = verify_walk.target_tokens(flat, positions, requests, torch.ones(3), seeds)

    assert tokens[0] == tokens[1]
    assert len({*tokens[1:5].tolist()}) == 4
    assert tokens[5] % 2 == 1


def test_draws_have_the_distribution_of_the_logits() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    num_draws, probabilities = 20000, torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    rows = (
        probabilities.log().expand(num_draws, 5),
        torch.arange(num_draws),
        torch.zeros(num_draws, dtype=torch.int32),
        torch.ones(1),
        torch.tensor([42]),
    )

    # the twin's, which the kernel agrees with: the interpreter would take minutes
    counts = reference.target_tokens(*rows).bincount(minlength=5)

    assert scipy_stats.chisquare(counts.numpy(), (num_draws * probabilities).numpy()).pvalue > 1e-4
