"""Four engines that take turns at every prompt, so that what else the machine does falls on all of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_redrafter.bench import memory
from vllm_redrafter.cli.engine import Engine, EngineSpec
from vllm_redrafter.cli.generation import Generation, Prompt
from vllm_redrafter.cli.options import speculative_config
from vllm_redrafter.cli.progress import Progress

LABELS = {"baseline": "baseline", "chain": "chain of 4", "tree": "tree of 8", "auto": "automatic budget"}
NUM_ROUNDS = 3
MAX_MEASURING_SECONDS = 60
"""No further round begins after this: a busy or slow machine gets fewer."""
MIN_MEASUREMENTS = 3
"""Per engine, however long they take: fewer have a median that one of them can move."""

Rounds = list[list[Generation]]
"""What one engine did: in every round, one generation per prompt."""


def specs(target: str, drafter: str, dtype: str) -> dict[str, EngineSpec]:
    """Return the target alone, a chain, a tree, and the budget that the plugin picks by itself."""
    configs = {
        "baseline": None,
        "chain": speculative_config(drafter, num_speculative_tokens=4, beam_width=1, draft_length=4, budget="fixed"),
        "tree": speculative_config(drafter, num_speculative_tokens=8, budget="fixed"),
        "auto": speculative_config(drafter, num_speculative_tokens=8),
    }
    return {name: EngineSpec(target, config, dtype, enable_chunked_prefill=False) for name, config in configs.items()}


def run(
    specs: Mapping[str, EngineSpec],
    prompts: Sequence[Prompt],
    sampling: dict[str, Any],
    warm_up: Callable[[str, Engine], None],
    progress: Progress,
    *,
    verbose: bool = False,
) -> dict[str, Rounds]:
    """Return each engine's rounds; a prompt runs alone and one engine works at a time.

    All engines stay up and take turns at every prompt; where memory is short, or on a GPU, they run one after another,
    and then one may have had time for more rounds than another.
    """
    rounds: dict[str, Rounds] = {name: [] for name in specs}
    groups = _groups(specs)
    for group in groups:
        with contextlib.ExitStack() as stack:
            engines = {name: Engine(specs[name], verbose=verbose) for name in group}
            # The automatic budget measures the machine while its engine starts, so that one starts alone, and first:
            # there is something to read while the others start.
            for names in filter(None, (group[-1:], group[:-1])):
                progress.say(f"starting: {', '.join(LABELS[name] for name in names)}")
                for name in names:
                    stack.push(engines[name])
                    engines[name].spawn()
                for name in names:
                    engines[name].wait_ready()
                for name in names:
                    warm_up(name, engines[name])
            started = time.perf_counter()
            for number in range(NUM_ROUNDS):
                is_late = time.perf_counter() - started > MAX_MEASURING_SECONDS / len(groups)
                if is_late and number * len(prompts) >= MIN_MEASUREMENTS:
                    break
                for name in engines:
                    rounds[name].append([])
                for turn, prompt in enumerate(prompts):
                    progress.count(f"measuring, round {number + 1} of {NUM_ROUNDS}", turn, len(prompts))
                    for name, engine in engines.items():
                        rounds[name][-1].append(engine.generate([prompt], sampling))
    return rounds


def _groups(specs: Mapping[str, EngineSpec]) -> list[list[str]]:
    """Return which engines are up together."""
    together = memory.engines_fit([spec.target for spec in specs.values()])
    return [list(specs)] if together else [[name] for name in specs]
