"""The size of trees by load: on a simulated GPU, whose clock is a formula."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from vllm_redrafter.adapter.v2.sizes import TreeSizes, graph_sizes

SIZES = (0, 2, 4, 8)
LIKELY = {2: 0.6, 4: 0.7, 8: 0.75}
"""How likely the next draft is accepted after those before it, by the size of the tree."""
UNLIKELY = {2: 0.15, 4: 0.18, 8: 0.2}


def step_seconds(batch_size: int, size: int) -> float:
    """Return what a step takes: reading the weights or multiplying with them, whichever takes longer, and drafting."""
    rows = batch_size * (1 + size)
    return max(4e-3, rows * 27e-6) + (0.8e-3 + batch_size * 8e-6 if size else 0.0)


class Served(NamedTuple):
    speed: float
    """Tokens per second."""
    sizes: Counter[int]
    """Steps by the size of the trees that they verified."""


def serve(
    sizes: TreeSizes | int,
    batch_size: int,
    chances: dict[int, float],
    num_steps: int = 1000,
    *,
    seconds: Callable[[int, int], float] = step_seconds,
    prompt_every: int = 0,
) -> Served:
    """Let a batch decode; a step's output is known when the next one has been scheduled, as with async scheduling."""
    generator = random.Random(batch_size)
    clock, num_tokens, size, pending, used = 0.0, 0, 0, (), Counter[int]()
    for step in range(num_steps):
        chosen = sizes if isinstance(sizes, int) else sizes[batch_size]
        took = seconds(batch_size, size) * generator.uniform(1.0, 1.04)
        accepted = sum(_accepted(generator, size, chances) for _ in range(batch_size))
        has_prompt = prompt_every > 0 and step % prompt_every == 0
        for observe in pending:
            observe()
        if isinstance(sizes, TreeSizes):
            pending = _lessons(sizes, batch_size, size, took, accepted, has_prompt)
        clock += took + (10e-3 if has_prompt else 0.0)
        num_tokens += batch_size + accepted
        used[size] += 1
        size = chosen
    return Served(num_tokens / clock, used)


def _accepted(generator: random.Random, size: int, chances: dict[int, float]) -> int:
    depth = 0
    while depth < min(size, 6) and generator.random() < chances[size]:
        depth += 1
    return depth


def _lessons(
    sizes: TreeSizes, batch_size: int, size: int, seconds: float, accepted: int, has_prompt: bool
) -> tuple[Callable[[], None], ...]:
    def of_trees() -> None:
        sizes.observe_trees(size, batch_size if size else 0, accepted)

    def of_step() -> None:
        sizes.observe_step(batch_size, size, seconds)

    return (of_trees,) if has_prompt else (of_trees, of_step)


def settle(
    sizes: TreeSizes, batch_size: int, seconds: dict[int, float], accepted: dict[int, float], num_steps: int = 1000
) -> int:
    """Tell a table again and again what its sizes take and bring per request, and return what it most often chooses."""
    chosen = Counter[int]()
    for _ in range(num_steps):
        size = sizes[batch_size]
        chosen[size] += 1
        sizes.observe_trees(size, 1000 if size else 0, round(1000 * accepted[size]) if size else 0)
        sizes.observe_step(batch_size, size, seconds[size])
    return chosen.most_common(1)[0][0]


def best_fixed(batch_size: int, chances: dict[int, float]) -> Served:
    return max((serve(size, batch_size, chances) for size in SIZES), key=lambda served: served.speed)


@pytest.mark.parametrize("chances", [LIKELY, UNLIKELY], ids=["likely", "unlikely"])
@pytest.mark.parametrize("batch_size", [1, 4, 16, 32, 48, 64, 96, 128, 256])
def test_it_is_hardly_slower_than_the_best_size_or_than_none(batch_size: int, chances: dict[int, float]) -> None:
    chosen = serve(TreeSizes(SIZES), batch_size, chances, 2000)

    assert chosen.speed > 0.97 * best_fixed(batch_size, chances).speed
    assert chosen.speed > 0.98 * serve(0, batch_size, chances).speed


def test_large_trees_are_for_small_batches_and_none_for_large_ones() -> None:
    sizes = TreeSizes(SIZES)

    most_used = [serve(sizes, batch_size, LIKELY).sizes.most_common(1)[0][0] for batch_size in (1, 16, 32, 64, 256)]

    assert most_used == sorted(most_used, reverse=True)
    assert (most_used[0], most_used[-1]) == (8, 0)
    assert len(set(most_used)) >= 3


def test_trials_that_do_not_pay_cost_less_than_a_hundredth() -> None:
    chosen = serve(TreeSizes(SIZES), 128, UNLIKELY, 6000)

    assert 0 < 6000 - chosen.sizes[0] < 120
    assert chosen.speed > 0.99 * serve(0, 128, UNLIKELY, 6000).speed


@pytest.mark.parametrize("batch_size", [8, 256])
def test_prompts_between_the_steps_do_not_keep_it_from_learning(batch_size: int) -> None:
    chosen = serve(TreeSizes(SIZES), batch_size, LIKELY, 3000, prompt_every=2)

    fixed = max(serve(size, batch_size, LIKELY, 3000, prompt_every=2).speed for size in SIZES)
    assert chosen.speed > 0.96 * fixed


@pytest.mark.parametrize(("batch_size", "guess"), [(1, 8), (28, 8), (29, 4), (51, 4), (52, 2), (86, 0), (1000, 0)])
def test_where_no_step_can_be_timed_it_stays_with_its_guess(batch_size: int, guess: int) -> None:
    assert set(serve(TreeSizes(SIZES), batch_size, LIKELY, prompt_every=1).sizes) <= {0, guess}
    assert TreeSizes(SIZES)[batch_size] == guess


def test_it_follows_what_is_accepted() -> None:
    sizes = TreeSizes(SIZES)
    dear = dict.fromkeys(SIZES, 0.05)

    used = [serve(sizes, 16, chances, 4000).sizes.most_common(1)[0][0] for chances in (LIKELY, dear, LIKELY)]

    assert used == [8, 0, 8]


def test_it_follows_what_steps_take() -> None:
    sizes = TreeSizes(SIZES)

    def slow(batch_size: int, size: int) -> float:
        return step_seconds(batch_size, size) * (1 + size)

    first = serve(sizes, 4, LIKELY).sizes.most_common(1)[0][0]
    then = serve(sizes, 4, LIKELY, seconds=slow).sizes.most_common(1)[0][0]

    assert (first, then) == (8, 0)


def test_one_slow_moment_changes_nothing() -> None:
    sizes = TreeSizes(SIZES)
    serve(sizes, 4, LIKELY)

    for _ in range(4):
        sizes.observe_step(4, 8, 0.05)

    assert serve(sizes, 4, LIKELY, 100).sizes[8] > 90


def test_a_load_begins_with_what_is_known_of_one_like_it() -> None:
    sizes = TreeSizes(SIZES)
    serve(sizes, 16, UNLIKELY | dict.fromkeys(SIZES, 0.0))

    # of its own it would begin with 8, and try all others
    assert serve(sizes, 24, UNLIKELY, 20).sizes == {0: 20}
    assert sizes[2] == 8


def test_of_two_loads_like_it_the_nearer_one_counts() -> None:
    sizes = TreeSizes((0, 8))
    settle(sizes, 8, {0: 1.0, 8: 9.0}, {8: 1.0})
    settle(sizes, 16, {0: 1.0, 8: 1.0}, {8: 1.0})

    assert [sizes[batch_size] for batch_size in (10, 14)] == [0, 8]


def test_drafts_that_bring_a_hundredth_are_left() -> None:
    accepted = {8: 1.0}

    assert settle(TreeSizes((0, 8)), 1, {0: 1.0, 8: 2 / 1.01}, accepted) == 0
    assert settle(TreeSizes((0, 8)), 1, {0: 1.0, 8: 2 / 1.04}, accepted) == 8


def test_no_drafts_are_found_to_be_best_though_sizes_between_are_worse_than_large_ones() -> None:
    seconds, accepted = {0: 1.0, 2: 1.3, 4: 1.4, 8: 1.95}, {2: 0.1, 4: 0.3, 8: 0.9}

    assert settle(TreeSizes(SIZES), 1, seconds, accepted) == 0


def test_a_trial_that_prompts_keep_from_being_timed_ends_all_the_same() -> None:
    sizes = TreeSizes((0, 8))
    while sizes[1] == 8:
        sizes.observe_trees(8, 10, 20)
        sizes.observe_step(1, 8, 1.0)

    assert {sizes[1] for _ in range(150)} == {0}
    assert {sizes[1] for _ in range(100)} == {0, 8}
    assert {sizes[1] for _ in range(1000)} == {8}


def test_eight_nodes_for_everybody_would_be_far_slower_than_none_with_256_requests() -> None:
    none = serve(0, 256, LIKELY, 100).speed

    assert serve(8, 256, LIKELY, 100).speed < 0.45 * none
    assert serve(8, 256, UNLIKELY, 100).speed < 0.2 * none


def test_a_size_that_no_graph_holds_is_never_chosen() -> None:
    assert set(serve(TreeSizes([0, 3]), 8, {3: 0.7}).sizes) == {0, 3}
    assert set(serve(TreeSizes([5]), 256, {5: 0.1}).sizes) == {0, 5}  # the first step had nothing drafted before it


@pytest.mark.parametrize(
    ("num_nodes", "max_num_seqs", "expected"),
    [
        (8, 256, [(1, 28, 8), (29, 51, 4), (52, 85, 2), (86, 256, 0)]),
        (8, 64, [(1, 28, 8), (29, 51, 4), (52, 63, 2), (64, 64, 0)]),
        (8, 4, [(1, 1, 8), (2, 2, 4), (3, 3, 2), (4, 4, 0)]),
        (8, 2, [(1, 1, 8), (2, 2, 0)]),
        (8, 1, [(1, 1, 8)]),
        (1, 256, [(1, 128, 1), (129, 256, 0)]),
        (63, 1024, [(1, 4, 63), (5, 8, 31), (9, 16, 15), (17, 1024, 0)]),
    ],
)
def test_graphs_are_captured_for_all_nodes_for_half_for_a_quarter_and_for_none(
    num_nodes: int, max_num_seqs: int, expected: list[tuple[int, int, int]]
) -> None:
    assert graph_sizes(num_nodes, max_num_seqs) == expected


@given(num_nodes=st.integers(1, 63), max_num_seqs=st.integers(4, 1024))
def test_vllm_finds_every_size_in_its_table(num_nodes: int, max_num_seqs: int) -> None:
    table = build_dynamic_sd_schedule_lookup(graph_sizes(num_nodes, max_num_seqs), max_num_seqs, num_nodes)

    expected = {num_nodes, num_nodes // 2, num_nodes // 4, 0}
    assert set(table[1:]) == expected
    assert table[1:] == sorted(table[1:], reverse=True)
