"""Speed of speculation against the target alone: one run, side by side, on real text that ends where it ends.

The configurations take turns within every round, so that a slow phase of the machine falls on all of them, and only
one engine works at a time. A speed-up is the median over rounds of the ratio to plain vLLM in the same round. Each
output is compared with plain vLLM's at the same load: a fast wrong answer is none.

How an engine is run is the caller's (`Start`): this file plans, compares and summarises. Not measured here: latency of
single tokens, and what a server adds.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

from vllm_redrafter.core.config import check_num_nodes

PLAIN = "plain"
"""The target alone, which the others are compared with."""

STORY_PROMPTS = Path(__file__).with_name("story_prompts.txt")
"""Openings of stories, one per line."""

SpeculativeConfig = dict[str, Any] | None

_CONFIG_NAME = re.compile(r"(?:ngram(?!.*-)|chain(?=\d)|tree(?=\d)|auto)(\d*)(-unpacked)?")
_WARM_UP_TOKENS = 32
_MIN_PROMPTS = 8


class Request(NamedTuple):
    """A text to continue."""

    text: str
    seed: int | None
    """Of the request's own random numbers; None where nothing is drawn."""


class Outcome(NamedTuple):
    """What an engine made of some requests."""

    token_ids: list[list[int]]
    """Per request, the prompt not included."""
    num_steps: list[int]
    """Decode steps per request: the one that reads the prompt is not counted."""
    seconds: float
    stats: Mapping[str, float]
    """What the drafter's counters grew by; empty without a drafter."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all requests over the time that they took together."""
        return sum(len(tokens) for tokens in self.token_ids) / self.seconds


class Engine(Protocol):
    """A running engine."""

    def generate(self, requests: Sequence[Request], sampling: dict[str, Any]) -> Outcome:
        """Answer all requests; `sampling` holds keyword arguments of vLLM's `SamplingParams`."""


Start = Callable[[SpeculativeConfig, int], contextlib.AbstractContextManager[Engine]]
"""Starts an engine that runs at most so many requests at once, and ends it."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    batch_sizes: Sequence[int] = (1, 4, 16, 32)
    """Requests that run at once."""
    temperatures: Sequence[float] = (0.0, 1.0)
    num_rounds: int = 3
    max_tokens: int = 256
    """Of an answer that has not ended by itself."""
    num_prompts: int | None = None
    """Requests per batch size; twice the batch size by default, and at least 8."""
    num_starts: int = 1
    """How often engines are started, each time for all rounds: where steps are short, starts differ by up to 10%."""

    def requests(self, prompts: Sequence[str], batch_size: int, temperature: float) -> list[Request]:
        """Return what is asked at a load; where prompts are few they come again, with other seeds."""
        count = self.num_prompts or max(_MIN_PROMPTS, 2 * batch_size)
        return [Request(prompts[i % len(prompts)], i if temperature > 0 else None) for i in range(count)]


class Result(NamedTuple):
    """One configuration at one load."""

    config: str
    batch_size: int
    temperature: float
    tokens_per_second: float
    """Median over rounds."""
    speedup: float
    """Median over rounds of the ratio to plain vLLM in the same round."""
    speedup_range: tuple[float, float] | None
    """Between which ratios it lies, see `median_range`."""
    tokens_per_step: float | None
    """Tokens that a request gets from a decode step; None where every answer has one token."""
    mean_acceptance_length: float | None
    """The same by the drafter's own counters, which also have what was accepted behind an answer's end."""
    nodes_per_step: float | None
    """Drafted tokens that the target verifies for a request in a step."""
    num_different: int
    """Answers, all rounds together, that are not plain vLLM's."""
    num_answers: int
    step_ms: dict[str, float]
    """Milliseconds per engine step: `total`, what the drafter's timers say, and the `rest`, which is the target's.

    Empty where nobody counts the steps: without a drafter they are known at batch size 1 only.
    """
    rounds: list[float]
    """Tokens per second of every round."""


def speculative_config(name: str, drafter: str) -> SpeculativeConfig:
    """Return what vLLM takes as `speculative_config` for the name of a configuration.

    plain; ngram or ngramN (vLLM's own, of 4 or N tokens); chainN and treeN (always N nodes); auto or autoN (as many
    nodes as pay, at most the drafter's default or N). With -unpacked behind a chain, tree or auto, a CPU's target
    multiplies as plain vLLM's does.

    Raises:
        ValueError: there is no such configuration, or N is out of range.
    """
    if name == PLAIN:
        return None
    match = _CONFIG_NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"there is no configuration {name!r}: use plain, ngram, ngramN, chainN, treeN, auto or autoN, or one of "
            "the last four with -unpacked behind it"
        )
    size = int(match[1]) if match[1] else None
    if size is not None:
        check_num_nodes(size)
    if name.startswith("ngram"):
        # a window of 2 to 4 tokens, as vLLM's documentation has it
        return {
            "method": "ngram",
            "num_speculative_tokens": size or 4,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
    config: dict[str, Any] = {"method": "redrafter", "model": drafter}
    if size is not None:
        config["num_speculative_tokens"] = size
    if name.startswith("chain"):
        config |= {"beam_width": 1, "draft_length": size}
    if match[2]:
        config["pack_target"] = False
    return config | {"budget": "auto" if name.startswith("auto") else "fixed"}


def check_has_plain(configs: Mapping[str, SpeculativeConfig]) -> None:
    """Refuse configurations without the one that they are compared with.

    Raises:
        ValueError: it is not among them.
    """
    if PLAIN not in configs:
        raise ValueError(
            f"the configurations {', '.join(configs)} lack {PLAIN!r}, which they are compared with: add it"
        )


def timers(stats: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of every timer among the drafter's counters, by what it times."""
    return {name.removesuffix("_seconds"): value for name, value in stats.items() if name.endswith("_seconds")}


def measure(
    configs: Mapping[str, SpeculativeConfig],
    prompts: Sequence[str],
    plan: Plan,
    start: Start,
    report: Callable[[str], None],
    *,
    together: bool = True,
) -> Iterator[list[Result]]:
    """Yield the results of one batch size after another.

    Args:
        configs: by name; plain vLLM is among them.
        report: told what is going on.
        together: whether the engines of a batch size may be up at the same time; where memory is short they run one
            after another, each all of its rounds.

    Raises:
        ValueError: there is nothing to compare with.
    """
    check_has_plain(configs)
    if not prompts:
        raise ValueError("there are no prompts: pass at least one")
    groups = [list(configs)] if together else [[name] for name in configs]
    for batch_size in plan.batch_sizes:
        outcomes: dict[tuple[str, float], list[Outcome]] = {
            (name, temperature): [] for temperature in plan.temperatures for name in configs
        }
        for group, number in itertools.product(groups, range(plan.num_starts)):
            with contextlib.ExitStack() as stack:
                engines: dict[str, Engine] = {}
                # one by one: an engine that times its steps while it starts must have the machine to itself
                for name in group:
                    report(f"batch size {batch_size}: starting {name}{_of(number, plan.num_starts)}")
                    engines[name] = stack.enter_context(start(configs[name], batch_size))
                    _warm_up(engines[name], prompts, plan, batch_size)
                for key, outcome in _rounds(engines, prompts, plan, batch_size, report):
                    outcomes[key].append(outcome)
        yield [
            summarise(name, batch_size, temperature, outcomes[name, temperature], outcomes[PLAIN, temperature])
            for name, temperature in outcomes
        ]


def _rounds(
    engines: Mapping[str, Engine],
    prompts: Sequence[str],
    plan: Plan,
    batch_size: int,
    report: Callable[[str], None],
) -> Iterator[tuple[tuple[str, float], Outcome]]:
    """Yield what running engines make of all rounds, each with the engine's name and the temperature."""
    for number in range(plan.num_rounds):
        for temperature in plan.temperatures:
            requests = plan.requests(prompts, batch_size, temperature)
            sampling = {"temperature": temperature, "max_tokens": plan.max_tokens}
            for name, engine in engines.items():
                round_number = _of(number, plan.num_rounds, "round")
                report(f"batch size {batch_size}, temperature {temperature:g}{round_number}: {name}")
                yield (name, temperature), engine.generate(requests, sampling)


def _of(number: int, count: int, what: str = "time") -> str:
    return f", {what} {number + 1} of {count}" if count > 1 else ""


def summarise(
    config: str, batch_size: int, temperature: float, outcomes: Sequence[Outcome], plain: Sequence[Outcome]
) -> Result:
    """Return the figures of the rounds of one configuration, given plain vLLM's of the same rounds."""
    expected = plain[0].token_ids
    num_answers = sum(len(outcome.token_ids) for outcome in outcomes)
    steps = sum(sum(outcome.num_steps) for outcome in outcomes)
    decoded = sum(
        len(tokens) - 1
        for outcome in outcomes
        for tokens, num_steps in zip(outcome.token_ids, outcome.num_steps, strict=True)
        if num_steps
    )
    stats = {name: sum(outcome.stats[name] for outcome in outcomes) for name in outcomes[0].stats}
    rounds = [outcome.tokens_per_second for outcome in outcomes]
    speedups = [ours / alone.tokens_per_second for ours, alone in zip(rounds, plain, strict=True)]
    return Result(
        config,
        batch_size,
        temperature,
        tokens_per_second=median(rounds),
        speedup=median(speedups),
        speedup_range=median_range(speedups),
        tokens_per_step=decoded / steps if steps else None,
        mean_acceptance_length=_ratio(stats, "num_emitted_tokens", "num_steps"),
        nodes_per_step=_ratio(stats, "num_draft_tokens", "num_steps"),
        num_different=sum(
            tokens != wanted for outcome in outcomes for tokens, wanted in zip(outcome.token_ids, expected, strict=True)
        ),
        num_answers=num_answers,
        step_ms=_step_ms(
            # alone, a request has one step for its prompt and the others for itself
            stats or ({"num_engine_steps": steps + num_answers} if batch_size == 1 else {}),
            sum(outcome.seconds for outcome in outcomes),
        ),
        rounds=rounds,
    )


def median_range(values: Sequence[float]) -> tuple[float, float] | None:
    """Return between which of so many values their distribution's median lies, with 95% certainty.

    The interval of the sign test, which assumes nothing of the distribution but that values are drawn independently:
    rounds of one start of an engine are not quite. Fewer than six values do not tell.
    """
    places = sorted(values)
    outside, chance = 0, 0.5 ** len(places)  # that all values lie on one side of it
    while 2 * chance <= 0.05:
        outside += 1
        chance += math.comb(len(places), outside) * 0.5 ** len(places)
    return (places[outside - 1], places[-outside]) if outside else None


def _ratio(stats: Mapping[str, float], above: str, below: str) -> float | None:
    return stats[above] / stats[below] if stats.get(below) else None


def _step_ms(stats: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Return where the time of an engine step goes, by every timer among the counters."""
    steps = stats.get("num_engine_steps")
    if not steps:
        return {}
    parts = {name: 1000 * value / steps for name, value in timers(stats).items()}
    total = 1000 * seconds / steps
    return {"total": total, **parts, "rest": total - sum(parts.values())}


def _warm_up(engine: Engine, prompts: Sequence[str], plan: Plan, batch_size: int) -> None:
    """Let the engine see every kind of step that is measured, so that nothing is compiled or learned later."""
    for temperature in plan.temperatures:
        requests = plan.requests(prompts, batch_size, temperature)[:batch_size]
        engine.generate(requests, {"temperature": temperature, "max_tokens": min(_WARM_UP_TOKENS, plan.max_tokens)})
