from __future__ import annotations

import time
from statistics import median

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache

from mlx_port import cache, token_tree
from mlx_port.cache import Layout

HEAD = 32


def _rows(start: int, count: int, dim: int = HEAD) -> mx.array:
    """Return rows that say their position, [1, 2, count, dim]."""
    positions = mx.arange(start, start + count, dtype=mx.float32)
    return mx.broadcast_to(positions[:, None], (1, 2, count, dim)) * 1.0


def _filled(kind: str, past: int) -> object:
    layer = {"kv": KVCache, "quantised": lambda: QuantizedKVCache(32, 8), "rotating": lambda: RotatingKVCache(8, 2)}[
        kind
    ]()
    layer.update_and_fetch(_rows(0, past), _rows(0, past))
    return layer


def _held(layer: object) -> list[float]:
    """Return the rows that the next token will see, itself included."""
    keys, _ = layer.update_and_fetch(_rows(99, 1), _rows(99, 1))
    if isinstance(layer, QuantizedKVCache):
        keys = mx.dequantize(*keys, group_size=32, bits=8)
    return sorted(round(value) for value in keys[0, 0, :, 0].tolist())


@pytest.mark.parametrize("nodes", [[0], [0, 1], [0, 2], [0, 1, 4], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize(
    ("kind", "past"), [("kv", 5), ("kv", 254), ("quantised", 5), ("rotating", 4), ("rotating", 30)]
)
@pytest.mark.parametrize("times", [1, 2])
def test_the_accepted_rows_stay_and_the_others_go(kind: str, past: int, nodes: list[int], times: int) -> None:
    layer = _filled(kind, past)
    layer.update_and_fetch(_rows(past, 5), _rows(past, 5))

    appended = cache.gather([layer], 5, mx.array(nodes))
    mx.eval(appended)
    for _ in range(times):
        cache.commit([layer], nodes, appended)

    assert layer.offset == past + len(nodes)
    seen = [*range(past), *(past + node for node in nodes), 99]
    if kind == "rotating":
        # two that are always kept, and the last six
        seen = seen if len(seen) <= 8 else [*seen[:2], *seen[-6:]]
    assert _held(layer) == sorted(seen)


def test_lists_of_caches_are_committed_one_by_one() -> None:
    layers = CacheList(_filled("kv", 3), _filled("rotating", 3))
    for layer in layers.caches:
        layer.update_and_fetch(_rows(3, 3), _rows(3, 3))

    appended = cache.gather([layers], 3, mx.array([0, 2]))
    mx.eval(appended)
    cache.commit([layers], [0, 2], appended)

    assert [_held(layer) for layer in layers.caches] == [[0, 1, 2, 3, 5, 99]] * 2
    assert cache.num_cached([layers]) == 6


@pytest.mark.parametrize("past", [0, 3, 7, 20])
@pytest.mark.parametrize("window", [5, None])
def test_a_mask_lets_nodes_see_what_they_would_see_alone(past: int, window: int | None) -> None:
    tree = token_tree.best_nodes(0, [1, 2, 3, 4], [-1, 0, 1, -1], [-1.0, -2.0, -3.0, -4.0], 4)
    layout, max_size, keep = Layout(tree, past), 8, 2

    mask = layout.mask(max_size, keep, window).tolist()

    held = list(range(past)) if past < max_size else [0, 1, *range(past - 5, past)]
    for node, depth in enumerate(tree.depths):
        position = past + depth
        rows = [*held, *(past + other for other in tree.depths)]
        for column, row in enumerate(rows):
            is_held = row < keep or position - row < max_size - keep
            is_above = column < len(held) or bool(tree.ancestors[node] >> column - len(held) & 1)
            assert mask[node][column] == (is_held and is_above and (window is None or position - row < window))


@pytest.mark.parametrize("kind", ["kv", "quantised"])
def test_the_time_of_a_commit_does_not_grow_with_the_cache(kind: str) -> None:
    def step_seconds(past: int) -> float:
        layers = [_filled(kind, past) for _ in range(2)]
        mx.eval([layer.state[:2] for layer in layers])
        seconds = []
        for _ in range(12):
            start = time.perf_counter()
            for layer in layers:
                layer.update_and_fetch(_rows(0, 9), _rows(0, 9))
            appended = cache.gather(layers, 9, mx.array([0, 2, 5]))
            mx.eval(appended)
            cache.commit(layers, [0, 2, 5], appended)
            seconds.append(time.perf_counter() - start)
        return median(seconds)

    # a copy of 64 times as many rows takes about 64 times as long; the ratio without one is about 1
    assert step_seconds(32_000) < 12 * step_seconds(500)


def test_caches_that_cannot_hold_a_tree_are_named() -> None:
    assert cache.unsupported([KVCache(), CacheList(ArraysCache(2), RotatingKVCache(4))]) == {"ArraysCache"}
