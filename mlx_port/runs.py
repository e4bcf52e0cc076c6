"""Timed runs of one text, without drafts and with them, as rows of a CSV file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step as stock_generate_step
from mlx_lm.sample_utils import make_sampler

from mlx_port.decoding import generate_step
from mlx_port.drafter import ReDrafter
from mlx_port.plan import Plan
from mlx_port.target import Target
from mlx_port.telemetry import Telemetry

_TEMPERATURE = 1.0


@dataclass(frozen=True)
class Autoregression:
    """A run without drafts: Apple's columns, in milliseconds, then ours."""

    run: int
    dtype: str
    comprehension_mlx: float
    """Until mlx-lm's first token."""
    generation_mlx: float
    """Of mlx-lm's other tokens."""
    comprehension_ours: float
    generation_ours: float
    """The same of a loop that waits for every token."""
    greedy: bool
    num_tokens: int


@dataclass(frozen=True)
class Drafting:
    """A run with drafts: Apple's columns, times in milliseconds, then ours."""

    run: int
    beam_width: int
    beam_length: int
    """The init token included."""
    dtype: str
    nmax_length: int
    greedy: bool
    steps: int
    """Verifications."""
    prompt_length: int
    prompt_and_generated_length: int
    comprehension_and_generation_time: float
    comprehension_time: float
    tokens_per_second: float
    """Without the prompt's time."""
    tokens_per_step: float
    speedup: float
    """Over the mean of mlx-lm's runs of this type and sampling."""
    tree_budget: int
    drafter_bits: int | None


def autoregression(
    target: Target, prompt: list[int], num_tokens: int, run: int, dtype: str, greedy: bool
) -> Autoregression:
    """Return the times of a text without drafts."""
    sampler = None if greedy else make_sampler(temp=_TEMPERATURE)
    stock = stock_generate_step(mx.array(prompt), target.model, max_tokens=num_tokens, sampler=sampler)
    first_mlx, rest_mlx = timed(stock)
    first_ours, rest_ours = timed(_waiting(target, prompt, num_tokens))
    return Autoregression(run, dtype, first_mlx, rest_mlx, first_ours, rest_ours, greedy, num_tokens)


def drafting(
    target: Target,
    drafter: ReDrafter,
    prompt: list[int],
    num_tokens: int,
    run: int,
    dtype: str,
    greedy: bool,
    plan: Plan,
    baseline: float,
) -> Drafting:
    """Return the times of a text with drafts; `baseline` is mlx-lm's speed in tokens per second."""
    telemetry = Telemetry()
    sampler = None if greedy else make_sampler(temp=_TEMPERATURE)
    first, rest = timed(
        generate_step(
            mx.array(prompt),
            target,
            drafter,
            plan=plan,
            max_tokens=num_tokens,
            sampler=sampler,
            telemetry=telemetry,
        )
    )
    speed = (num_tokens - 1) * 1000 / rest
    return Drafting(
        run=run,
        beam_width=plan.shape.width,
        beam_length=plan.shape.length + 1,
        dtype=dtype,
        nmax_length=len(prompt) + num_tokens,
        greedy=greedy,
        steps=telemetry.round_count,
        prompt_length=len(prompt),
        prompt_and_generated_length=len(prompt) + num_tokens,
        comprehension_and_generation_time=first + rest,
        comprehension_time=first,
        tokens_per_second=speed,
        tokens_per_step=(num_tokens - 1) / max(1, telemetry.round_count),
        speedup=speed / baseline,
        tree_budget=plan.num_nodes,
        drafter_bits=4 if dtype == "q4" else None,
    )


def _waiting(target: Target, prompt: list[int], num_tokens: int) -> Iterator[int]:
    """Yield greedy tokens, one forward and one wait each."""
    caches = target.make_caches()
    read = prompt
    for _ in range(num_tokens):
        token_id = target.model(mx.array(read)[None], cache=caches)[0, -1].argmax().item()
        yield token_id
        read = [token_id]


def timed(steps: Iterable[Any]) -> tuple[float, float]:
    """Return the milliseconds until the first step and those of the others."""
    iterator = iter(steps)
    start = time.perf_counter()
    next(iterator)
    middle = time.perf_counter()
    for _ in iterator:
        pass
    return 1000 * (middle - start), 1000 * (time.perf_counter() - middle)
