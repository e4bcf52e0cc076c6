"""`bench speed`: tokens per second of several configurations, side by side with the target alone."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_redrafter.cli import options, table
from vllm_redrafter.cli.engine import Engine, EngineSpec
from vllm_redrafter.cli.errors import FAILED, CommandError
from vllm_redrafter.cli.generation import Prompt
from vllm_redrafter.cli.pair import check_pair
from vllm_redrafter.cli.progress import Progress
from vllm_redrafter.cli.prompts import read_conversations

if TYPE_CHECKING:
    from vllm_redrafter.bench.speed import Outcome, Request, Result, SpeculativeConfig

_CONFIGS = ("plain", "ngram", "chain4", "tree2", "tree8", "auto")
_GPU_CONFIGS = ("plain", "ngram", "chain4", "tree8", "tree16", "auto")


def add_parser(benches: Any) -> None:
    """Add the sub-command."""
    parser = benches.add_parser(
        "speed",
        help="tokens per second beside plain vLLM, at several loads",
        description="Runs the configurations in turn and compares speed and outputs with those of the target alone.",
        allow_abbrev=False,
    )
    options.add_pair(parser, drafter_required=True)
    parser.add_argument(
        "--prompts", metavar="FILE", type=Path, help="text, JSONL, MT-Bench or ShareGPT (default: openings of stories)"
    )
    parser.add_argument(
        "--num-prompts",
        metavar="N",
        type=options.positive_int,
        help="requests per batch size (default: twice the batch size, at least 8)",
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=options.positive_int, default=256, help="per answer (default: 256)"
    )
    parser.add_argument(
        "--batch-sizes",
        metavar="N,...",
        type=options.list_of(options.positive_int),
        default=(1, 4, 16, 32),
        help="requests that run at once (default: 1,4,16,32)",
    )
    parser.add_argument(
        "--temperature",
        metavar="X,...",
        type=options.list_of(options.number),
        default=(0.0, 1.0),
        help="0 is greedy, else seeded (default: 0,1)",
    )
    parser.add_argument(
        "--configs",
        metavar="NAME,...",
        type=options.list_of(str),
        help="plain, ngram or ngramN, chainN, treeN, auto or autoN; the last four also with -unpacked behind them, for "
        "a CPU's target that multiplies as plain vLLM's (default: "
        f"{','.join(_CONFIGS)}; on a GPU {','.join(_GPU_CONFIGS)})",
    )
    parser.add_argument("--rounds", metavar="N", type=options.positive_int, default=3, help="default: 3")
    parser.add_argument(
        "--starts",
        metavar="N",
        type=options.positive_int,
        default=1,
        help="start the engines that often, each time for all rounds: where steps are short, starts differ by up to "
        "10%% (default: 1)",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write everything measured as JSON")
    options.add_engine(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from vllm_redrafter import provenance
    from vllm_redrafter.bench import memory, speed

    check_pair(arguments.target, arguments.drafter)
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise CommandError(f"--output: no directory {str(arguments.output.parent)!r}: create it first")
    prompts = [conversation.turns[0] for conversation in read_conversations(arguments.prompts or speed.STORY_PROMPTS)]
    plan = speed.Plan(
        arguments.batch_sizes,
        arguments.temperature,
        arguments.rounds,
        arguments.max_tokens,
        arguments.num_prompts,
        arguments.starts,
    )
    names = arguments.configs or (_GPU_CONFIGS if memory.has_gpu() else _CONFIGS)
    try:
        configs = {name: speed.speculative_config(name, arguments.drafter) for name in names}
    except ValueError as error:
        raise CommandError(f"--configs: {error}") from None
    if speed.PLAIN not in configs:
        raise CommandError(f"--configs: {speed.PLAIN!r} is missing, which the others are compared with: add it")

    progress = Progress()
    together = memory.engines_fit([arguments.target] * len(configs))
    if not together:
        print(
            "one engine after another, since they do not fit into memory together: a slow phase may fall on one",
            file=sys.stderr,
        )

    results: list[Result] = []
    for of_batch_size in speed.measure(configs, prompts, plan, _starter(arguments), progress.say, together=together):
        progress.clear()
        print(render(of_batch_size), end="\n\n", flush=True)
        results += of_batch_size
        if arguments.output is not None:
            measured = {"results": [result._asdict() for result in results], "alternating": together}
            arguments.output.write_text(json.dumps(provenance.describe() | measured, indent=1), encoding="utf-8")
    identical = all(result.num_different == 0 for result in results if _is_lossless(configs[result.config]))
    print(json.dumps({"identical": identical, "results": [_summary(result) for result in results]}))
    # in 16 bits near-ties flip with the shape of a batch
    return 0 if identical or arguments.dtype != "float32" else FAILED


def render(results: Sequence[Result]) -> str:
    """Return the results of one batch size as two tables: speed, and where the time of a step goes."""
    speed_rows = []
    step_rows = []
    parts = max((list(result.step_ms) for result in results), key=len)
    for result in results:
        load = (result.config, str(result.batch_size), f"{result.temperature:g}")
        speed_rows.append(
            (
                *load,
                table.number(result.tokens_per_second, 1),
                table.number(result.speedup, 2, "x"),
                _range(result),
                table.number(result.tokens_per_step),
                table.number(result.nodes_per_step, 1),
                _identity(result),
            )
        )
        if result.step_ms:
            step_rows.append((*load, *(table.number(result.step_ms.get(part)) for part in parts)))
    header = ("", "batch", "T", "tokens/s", "x plain", "95% in", "tokens/step", "nodes/step", "output")
    text = table.render(header, speed_rows)
    if not step_rows:
        return text
    return text + "\n\n" + table.render(("ms per step", "batch", "T", *parts), step_rows)


class _MeasuredEngine:
    """An engine as `bench.speed` knows it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate(self, requests: Sequence[Request], sampling: dict[str, Any]) -> Outcome:
        from vllm_redrafter.bench.speed import Outcome

        prompts = [Prompt(request.text, seed=request.seed) for request in requests]
        generation = self._engine.generate(prompts, sampling)
        for number, answer in enumerate(generation.answers, start=1):
            if answer.error is not None:
                raise CommandError(f"prompt {number}: {answer.error}")
        return Outcome(
            [answer.token_ids for answer in generation.answers],
            [answer.num_steps for answer in generation.answers],
            generation.seconds,
            generation.stats,
        )


def _starter(
    arguments: argparse.Namespace,
) -> Callable[[SpeculativeConfig, int], contextlib.AbstractContextManager[_MeasuredEngine]]:
    @contextlib.contextmanager
    def start(config: SpeculativeConfig, batch_size: int) -> Iterator[_MeasuredEngine]:
        with Engine(_spec(arguments, config, batch_size), verbose=arguments.verbose) as engine:
            yield _MeasuredEngine(engine)

    return start


def _spec(arguments: argparse.Namespace, config: SpeculativeConfig, batch_size: int) -> EngineSpec:
    return EngineSpec(arguments.target, config, arguments.dtype, batch_size, enable_chunked_prefill=False)


def _is_lossless(config: SpeculativeConfig) -> bool:
    """Return whether equal outputs are promised, sampled ones included; vLLM's n-gram draws by other rules."""
    return config is None or config["method"] == "redrafter"


def _range(result: Result) -> str:
    """Return where the speed-up is with 95% certainty, or a dash where too few rounds were run to tell."""
    from vllm_redrafter.bench.speed import PLAIN

    if result.speedup_range is None or result.config == PLAIN:
        return "–"
    return "–".join(table.number(end) for end in result.speedup_range)


def _identity(result: Result) -> str:
    return "identical" if result.num_different == 0 else f"{result.num_different} of {result.num_answers} differ"


def _summary(result: Result) -> dict[str, Any]:
    return {
        "config": result.config,
        "batch_size": result.batch_size,
        "temperature": result.temperature,
        "tokens_per_second": round(result.tokens_per_second, 1),
        "speedup": round(result.speedup, 3),
        "speedup_range": result.speedup_range and [round(end, 3) for end in result.speedup_range],
        "tokens_per_step": None if result.tokens_per_step is None else round(result.tokens_per_step, 3),
        "nodes_per_step": None if result.nodes_per_step is None else round(result.nodes_per_step, 3),
        "identical": result.num_different == 0,
    }
