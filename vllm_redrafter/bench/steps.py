"""What one decode step costs with and without drafts, by load and by length of context.

The time of a step is a difference: that of long answers, less that of answers of one token to the same prompts, over
the steps between. So neither the prompts nor what an engine does once per request is in it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, Protocol

from vllm_redrafter.bench.speed import PLAIN, SpeculativeConfig, check_has_plain, timers


class Run(NamedTuple):
    """What an engine did with some prompts."""

    seconds: float
    num_steps: list[int]
    """Decode steps per request: the one that reads the prompt is not counted."""
    num_tokens: int
    """Of all answers."""
    stats: Mapping[str, float]
    """What the drafter's counters grew by; empty without a drafter."""


class Engine(Protocol):
    """A running engine."""

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Run:
        """Answer prompts of tokens, greedily, with exactly so many tokens each."""


Start = Callable[[SpeculativeConfig, int], contextlib.AbstractContextManager[Engine]]
"""Starts an engine that runs at most so many requests at once, and ends it."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    batch_sizes: Sequence[int] = (1, 4, 16, 64)
    contexts: Sequence[int] = (1024, 8192, 32768)
    """Tokens of a prompt."""
    max_tokens: int = 64
    """Of an answer."""
    num_rounds: int = 3


class StepCost(NamedTuple):
    """One configuration at one load and length of context."""

    config: str
    batch_size: int
    context: int
    step_ms: float
    """Median over rounds."""
    ratio: float
    """To a step of the target alone, by medians."""
    tokens_per_step: float
    """Of a request."""
    parts_ms: dict[str, float]
    """What the drafter's timers say of a step; empty where they do not run."""


def measure(
    configs: Mapping[str, SpeculativeConfig],
    token_ids: Sequence[int],
    plan: Plan,
    start: Start,
    report: Callable[[str], None],
) -> Iterator[list[StepCost]]:
    """Yield the costs of one configuration after another, the target alone first, every engine alone on the machine.

    Args:
        configs: by name; plain vLLM is among them.
        token_ids: text that prompts are cut from; it comes again where it is too short.
        report: told what is going on.

    Raises:
        ValueError: there is nothing to compare with, or no text.
    """
    check_has_plain(configs)
    if not token_ids:
        raise ValueError("there is no text to cut prompts from: pass some")
    plain_ms: dict[tuple[int, int], float] = {}
    for name in sorted(configs, key=lambda name: name != PLAIN):
        found = []
        report(f"starting {name}")
        with start(configs[name], max(plan.batch_sizes)) as engine:
            for batch_size, context in itertools.product(plan.batch_sizes, plan.contexts):
                report(f"{name}, batch size {batch_size}, context {context}")
                prompts = [_cut(token_ids, context, index * context // batch_size) for index in range(batch_size)]
                cost = _cost(name, prompts, plan, engine)
                plain = plain_ms.setdefault((batch_size, context), cost.step_ms)
                found.append(cost._replace(ratio=cost.step_ms / plain))
        yield found


def sizes_that_pay(costs: Sequence[StepCost], configs: Mapping[str, SpeculativeConfig]) -> list[tuple[int, int, int]]:
    """Return the size of trees that yields most tokens per second by batch size, 0 where the target alone does.

    What model runner V2 takes as `num_speculative_tokens_per_batch_size`: first and last batch size, nodes. A batch
    between two that were measured gets what pays for the larger one, where drafts pay less.

    Args:
        costs: of all batch sizes; of several contexts the median gain counts.
        configs: by name; besides the target alone, trees of a given size are compared: an engine drafts in one shape.
    """
    sizes = {PLAIN: 0}
    for name, config in configs.items():
        if config is None or config.get("budget") != "fixed" or config.get("beam_width") == 1:
            continue
        if "num_speculative_tokens" in config:
            sizes[name] = config["num_speculative_tokens"]
    schedule: list[tuple[int, int, int]] = []
    for batch_size in sorted({cost.batch_size for cost in costs}):
        gains: dict[str, list[float]] = {name: [] for name in sizes}
        for cost in costs:
            if cost.batch_size == batch_size and cost.config in sizes:
                gains[cost.config].append(cost.tokens_per_step / cost.ratio)
        best = max(gains, key=lambda name: median(gains[name]))
        first = schedule[-1][1] + 1 if schedule else 1
        if schedule and schedule[-1][2] == sizes[best]:
            first = schedule.pop()[0]
        schedule.append((first, batch_size, sizes[best]))
    return schedule


def _cost(name: str, prompts: Sequence[Sequence[int]], plan: Plan, engine: Engine) -> StepCost:
    # whatever is compiled, learnt or cached once
    engine.generate(prompts, plan.max_tokens)
    step_ms, parts, num_tokens, num_steps = [], [], 0, 0
    for _ in range(plan.num_rounds):
        prefill = engine.generate(prompts, 1)
        run = engine.generate(prompts, plan.max_tokens)
        # requests decode side by side: the slowest has as many steps as the engine
        steps = max(run.num_steps)
        step_ms.append(1000 * (run.seconds - prefill.seconds) / steps)
        parts.append({part: 1000 * value / steps for part, value in timers(run.stats).items()})
        num_tokens += run.num_tokens - len(prompts)
        num_steps += sum(run.num_steps)
    parts_ms = {part: median(each[part] for each in parts) for part in parts[0]}
    return StepCost(name, len(prompts), len(prompts[0]), median(step_ms), 1.0, num_tokens / num_steps, parts_ms)


def _cut(token_ids: Sequence[int], length: int, offset: int) -> list[int]:
    """Return so many tokens from an offset on, going round: no two requests share more than they must."""
    return [token_ids[(offset + place) % len(token_ids)] for place in range(length)]
