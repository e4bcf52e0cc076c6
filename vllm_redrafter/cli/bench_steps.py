"""`bench steps`: what one decode step costs with and without drafts, by load and by length of context."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_redrafter.cli import options, table
from vllm_redrafter.cli.engine import Engine, EngineSpec
from vllm_redrafter.cli.errors import CommandError
from vllm_redrafter.cli.generation import Prompt
from vllm_redrafter.cli.pair import check_pair
from vllm_redrafter.cli.progress import Progress

if TYPE_CHECKING:
    from vllm_redrafter.bench.speed import SpeculativeConfig
    from vllm_redrafter.bench.steps import Run, StepCost


def add_parser(benches: Any) -> None:
    """Add the sub-command."""
    parser = benches.add_parser(
        "steps",
        help="milliseconds of a decode step, by load and length of context",
        description="Times decode steps of the target alone, of chains and of trees, prompts not counted.",
        allow_abbrev=False,
    )
    options.add_pair(parser, drafter_required=True)
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="what prompts are cut from (default: openings of stories)"
    )
    _add_list(parser, "batch-sizes", options.positive_int, (1, 4, 16, 64), "requests that run at once")
    _add_list(parser, "contexts", options.positive_int, (1024, 8192, 32768), "tokens of a prompt")
    _add_list(parser, "configs", str, ("plain", "chain4", "tree16"), "plain, chainN, treeN, ngramN")
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=options.positive_int,
        default=64,
        help="of an answer, 2 at least (default: 64)",
    )
    parser.add_argument("--rounds", metavar="N", type=options.positive_int, default=3, help="default: 3")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write everything measured as JSON")
    options.add_engine(parser)
    parser.set_defaults(run=run)


def _add_list(
    parser: argparse.ArgumentParser, name: str, parse: Callable[[str], object], default: tuple[object, ...], what: str
) -> None:
    told = ",".join(map(str, default))
    parser.add_argument(
        f"--{name}",
        metavar="X,...",
        type=options.list_of(parse),
        default=default,
        help=f"{what} (default: {told})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from transformers import AutoConfig, AutoTokenizer

    from vllm_redrafter import provenance
    from vllm_redrafter.bench import speed, steps

    check_pair(arguments.target, arguments.drafter)
    if arguments.max_tokens < 2:
        raise CommandError("--max-tokens is 1, but an answer's first token comes with its prompt: ask for 2 or more")
    longest = AutoConfig.from_pretrained(arguments.target).get_text_config().max_position_embeddings
    needed = max(arguments.contexts) + arguments.max_tokens
    if needed > longest:
        raise CommandError(
            f"--contexts: prompt and answer have {needed} tokens at most, but the target has {longest} positions"
        )
    try:
        configs = {name: speed.speculative_config(name, arguments.drafter) for name in arguments.configs}
    except ValueError as error:
        raise CommandError(f"--configs: {error}") from None
    text = options.read_text("--text", arguments.text or speed.STORY_PROMPTS)
    token_ids = AutoTokenizer.from_pretrained(arguments.target).encode(text, add_special_tokens=False)
    plan = steps.Plan(arguments.batch_sizes, arguments.contexts, arguments.max_tokens, arguments.rounds)

    progress = Progress()
    costs: list[StepCost] = []
    try:
        for of_one in steps.measure(configs, token_ids, plan, _starter(arguments), progress.say):
            progress.clear()
            print(render(of_one), end="\n\n", flush=True)
            costs += of_one
    except ValueError as error:
        raise CommandError(str(error)) from None
    schedule = steps.sizes_that_pay(costs, configs)
    print(f'what pays here, for model runner V2: "num_speculative_tokens_per_batch_size": {json.dumps(schedule)}\n')
    told = {"costs": [cost._asdict() for cost in costs], "num_speculative_tokens_per_batch_size": schedule}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(provenance.describe() | told, indent=1), encoding="utf-8")
    print(json.dumps(told))
    return 0


def render(costs: Sequence[StepCost]) -> str:
    """Return the costs as a table."""
    parts = max((list(cost.parts_ms) for cost in costs), key=len)
    rows = [
        (
            cost.config,
            str(cost.batch_size),
            str(cost.context),
            table.number(cost.step_ms),
            table.number(cost.ratio, 2, "x"),
            table.number(cost.tokens_per_step),
            *(table.number(cost.parts_ms.get(part)) for part in parts),
        )
        for cost in costs
    ]
    return table.render(("", "batch", "context", "ms/step", "x plain", "tokens/step", *parts), rows)


class _MeasuredEngine:
    """An engine as `bench.steps` knows it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Run:
        from vllm_redrafter.bench.steps import Run

        sampling = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
        generation = self._engine.generate([Prompt(token_ids=tuple(prompt)) for prompt in prompts], sampling)
        for answer in generation.answers:
            if answer.error is not None:
                raise CommandError(answer.error)
        num_steps = [answer.num_steps for answer in generation.answers]
        return Run(generation.seconds, num_steps, generation.num_tokens, generation.stats)


def _starter(
    arguments: argparse.Namespace,
) -> Callable[[SpeculativeConfig, int], contextlib.AbstractContextManager[_MeasuredEngine]]:
    @contextlib.contextmanager
    def start(config: SpeculativeConfig, batch_size: int) -> Iterator[_MeasuredEngine]:
        with Engine(EngineSpec(arguments.target, config, arguments.dtype, batch_size), verbose=arguments.verbose) as it:
            yield _MeasuredEngine(it)

    return start
