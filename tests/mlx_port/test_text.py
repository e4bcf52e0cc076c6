from __future__ import annotations

import contextlib
import itertools
import linecache
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import make_prompt_cache

import mlx_port
from mlx_port import acceptance, cache, calibration, token_tree
from mlx_port.calibration import Pace
from mlx_port.decoding import generate_step
from mlx_port.target import Target
from tests.mlx_port.tiny_models import PROMPT, alone, make_drafter, make_plan, make_target

NUM_TOKENS = 10
INTERRUPTIBLE = (str(Path(mlx_port.__file__).parent), str(Path(mlx_lm.__file__).parent / "models"))


@contextlib.contextmanager
def ctrl_c_before(line: int | None) -> Iterator[Iterator[int]]:
    """Raises KeyboardInterrupt before the `line`-th line of ours or of mlx-lm's models that runs inside.

    Yields a counter of those lines. A line with a `yield` is not one of them: its token is about to be the caller's.
    """
    counter = itertools.count()

    def trace(frame: Any, event: str, _: object) -> Callable | None:
        file = frame.f_code.co_filename
        if not file.startswith(INTERRUPTIBLE):
            return None
        if event == "line" and "yield" not in linecache.getline(file, frame.f_lineno) and next(counter) == line:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield counter
    finally:
        sys.settrace(None)


def assert_every_nth_line_may_be_interrupted(
    target: Target, stride: int, max_kv_size: int | None = None, **options: Any
) -> None:
    """Breaks texts off at many places, then lets stock mlx-lm go on from what each has left."""
    kv_options = {name: option for name, option in options.items() if name.startswith(("kv_", "quantized_"))}
    expected = alone(target, PROMPT, NUM_TOKENS + 9, max_kv_size=max_kv_size, **kv_options)
    for line in itertools.count(0, stride):
        caches = make_prompt_cache(target.model, max_kv_size)
        steps = generate_step(
            mx.array(PROMPT), target, make_drafter(), prompt_cache=caches, max_tokens=NUM_TOKENS, **options
        )
        yielded = [next(steps)[0]]
        with contextlib.suppress(KeyboardInterrupt), ctrl_c_before(line) as counter:
            yielded += (token_id for token_id, _, _ in steps)
        count = len(yielded)

        assert yielded == expected[:count]
        offsets = {layer.offset for layer in cache.leaves(caches) if hasattr(layer, "offset")}
        assert offsets <= {len(PROMPT) + count}, f"broken off at line {line}"
        followed = alone(target, expected[count : count + 1], 8, prompt_cache=caches, **kv_options)
        assert followed == expected[count + 1 : count + 9], f"broken off at line {line}"
        if next(counter) <= line:
            # this one came to its end before
            assert line > 10 * stride
            return


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full caches": ("llama", {}),
    "windows of 12": ("gemma3", {}),
    "rotating caches of 13": ("qwen2", {"max_kv_size": 13}),
    "nodes as a batch": ("gpt2", {}),
    "caches that are quantised on the way": ("llama", {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 10}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_ctrl_c_anywhere_leaves_the_caches_with_what_was_yielded(case: str) -> None:
    name, options = CASES[case]

    assert_every_nth_line_may_be_interrupted(make_target(name), 53, plan=make_plan(4, 3, 8), **options)


def test_so_does_a_ctrl_c_where_drafting_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MIN_ROUNDS", 1)

    # one pace for all: it has seen enough after the first text
    assert_every_nth_line_may_be_interrupted(make_target("gemma3"), 29, pace=Pace(baseline_seconds=0.0))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (acceptance, "walk"),
        (cache, "gather"),
        (mx, "eval"),
        (cache, "commit"),
        (token_tree, "best_nodes"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_error_in_a_step_leaves_the_caches_with_what_was_yielded(
    module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_target("gemma3")
    expected = alone(target, PROMPT, NUM_TOKENS + 20)
    caches = make_prompt_cache(target.model)
    stock, calls = getattr(module, name), itertools.count(1)

    def fail_once(*args: Any) -> Any:
        if next(calls) == 4:
            raise RuntimeError("out of memory")
        return stock(*args)

    monkeypatch.setattr(module, name, fail_once)
    yielded: list[int] = []
    with pytest.raises(RuntimeError, match="out of memory"):
        yielded += (
            token_id for token_id, _, _ in generate_step(mx.array(PROMPT), target, make_drafter(), prompt_cache=caches)
        )
    count = len(yielded)

    assert 2 < count < 20
    assert {layer.offset for layer in caches} == {len(PROMPT) + count}
    assert alone(target, expected[count : count + 1], 8, prompt_cache=caches) == expected[count + 1 : count + 9]
