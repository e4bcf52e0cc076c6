"""`demo`: the same text with and without the drafter, how many tokens a step yields, and how much faster it is."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from vllm_redrafter.cli import color, options, race, table
from vllm_redrafter.cli.engine import Engine
from vllm_redrafter.cli.errors import FAILED, CommandError
from vllm_redrafter.cli.generation import Answer, Generation, Prompt, tokens_per_step
from vllm_redrafter.cli.pair import check_pair, serving
from vllm_redrafter.cli.progress import Progress
from vllm_redrafter.cli.prompts import read_conversations

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "models"
MAX_EXAMPLE_PROMPTS = 8
GROWTH_FACTOR = 4
"""Times as wide as the example target is what the demo runs, so that a step outlasts drafting."""


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "demo",
        help="show the same text with and without the drafter, and the speed",
        description="Streams one text, then runs the target alone, a chain, a tree and the automatic budget in turn.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", metavar="T", help="directory or Hub id (default: the example target)")
    parser.add_argument("--drafter", metavar="D", help="directory or Hub id (default: the example drafter)")
    parser.add_argument(
        "--as-is",
        action="store_true",
        help="do not grow the example target, a step of which takes little longer than drafting (see `bench grow`)",
    )
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="text, JSONL, MT-Bench or ShareGPT")
    parser.add_argument(
        "--max-tokens", metavar="N", type=options.positive_int, default=64, help="per answer (default: 64)"
    )
    parser.add_argument(
        "--temperature", metavar="X", type=options.number, default=0.0, help="0 is greedy (default); else seeded"
    )
    parser.add_argument(
        "--color", choices=color.CHOICES, default="auto", help="colour of accepted drafts (default: auto)"
    )
    parser.add_argument("--json-only", action="store_true", help="print nothing but the line of JSON")
    options.add_engine(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    _check(arguments)
    prompts = _prompts(arguments)
    progress = Progress(quiet=arguments.json_only)
    sampling = {"temperature": arguments.temperature, "max_tokens": arguments.max_tokens}

    def warm_up(name: str, engine: Engine) -> None:
        progress.say(f"warming up: {race.LABELS[name]}")
        if name != "auto" or arguments.json_only:
            engine.generate(prompts[:1], sampling)
            return
        progress.clear()
        _stream(engine, prompts[0], sampling, color.select(arguments.color))

    with _pair(arguments, progress) as (target, drafter):
        specs = race.specs(target, drafter, arguments.dtype)
        rounds = race.run(specs, prompts, sampling, warm_up, progress, verbose=arguments.verbose)
    progress.clear()
    _refuse_errors(_answers(rounds["baseline"][0]))
    summary = summarise(rounds)
    if not arguments.json_only:
        print(_render(rounds))
        print(f"outputs identical: {'yes' if summary['identical'] else 'NO'}", flush=True)
        print(f"\n{_next_commands(arguments)}\n", file=sys.stderr)
    print(json.dumps(summary))
    return 0 if summary["identical"] else FAILED


def summarise(rounds: dict[str, race.Rounds]) -> dict[str, Any]:
    """Return the figures of the last line: speeds are medians, and whether every output equals the baseline's."""
    return {
        "identical": all(_is_identical(rounds, name) for name in rounds),
        "speedup": round(_speedup(rounds, "auto"), 3),
        "mean_acceptance_length": round(_mean_acceptance_length(rounds["auto"]), 3),
        "tokens_per_second": {name: round(median(_speeds(own)), 1) for name, own in rounds.items()},
    }


def _next_commands(arguments: argparse.Namespace) -> str:
    """Return how to serve the pair and how to prove that it is lossless, as they can be typed here."""
    # the growing ends with the demo: what can be served of the example pair is what ships
    target = arguments.target or os.path.relpath(EXAMPLES / "target")
    drafter = arguments.drafter or os.path.relpath(EXAMPLES / "drafter")
    serve = [_program("vllm"), *serving(target, drafter, num_speculative_tokens=8)]
    verify = [_program("vllm-redrafter"), "verify", "--target", target, "--drafter", drafter]
    return f"to serve this pair:\n  {shlex.join(serve)}\nto prove that it changes nothing:\n  {shlex.join(verify)}"


def _program(name: str) -> str:
    """Return a console program by the path at which it stands beside this Python, or by its name."""
    path = Path(sys.executable).with_name(name)
    return os.path.relpath(path) if path.is_file() else name


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.target is None) != (arguments.drafter is None):
        raise CommandError("a drafter fits one target only: pass --target and --drafter together, or neither")
    if arguments.target is not None:
        if arguments.as_is:
            raise CommandError("only the example target is grown: leave out --as-is, or --target and --drafter")
        check_pair(arguments.target, arguments.drafter)
    elif not (EXAMPLES / "target").is_dir():
        raise CommandError(f"no example pair at {EXAMPLES}: run this in a checkout, or pass --target and --drafter")


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    conversations = read_conversations(arguments.prompts or EXAMPLES / "prompts.txt")
    if arguments.prompts is None:
        conversations = conversations[:MAX_EXAMPLE_PROMPTS]
    seeds = range(len(conversations)) if arguments.temperature > 0 else [None] * len(conversations)
    return [Prompt(item.turns[0], seed=seed) for item, seed in zip(conversations, seeds, strict=True)]


@contextlib.contextmanager
def _pair(arguments: argparse.Namespace, progress: Progress) -> Iterator[tuple[str, str]]:
    """Yield target and drafter: the user's or, unless it is wanted as it is, the example pair grown."""
    if arguments.target is not None:
        yield arguments.target, arguments.drafter
    elif arguments.as_is:
        yield str(EXAMPLES / "target"), str(EXAMPLES / "drafter")
    else:
        with tempfile.TemporaryDirectory(prefix="vllm-redrafter-") as directory:
            progress.say("growing the example target")
            num_parameters = _grow(Path(directory))
            progress.clear()
            if not arguments.json_only:
                print(
                    "The example target is so small that a step takes little longer than drafting. For this comparison "
                    "it is grown\nby weights that change nothing of what it computes: it says the same, at the price "
                    f"of a model of {num_parameters / 1e6:.0f}M parameters.\n(--as-is: not grown.)\n"
                )
            yield f"{directory}/target", f"{directory}/drafter"


def _grow(directory: Path) -> int:
    """Write the example pair, grown, as `target` and `drafter`; return the target's number of parameters."""
    from transformers.utils import logging

    from vllm_redrafter.bench.grow import TargetShape, grow_drafter, grow_target

    logging.disable_progress_bar()
    grow_drafter(EXAMPLES / "drafter", directory / "drafter", GROWTH_FACTOR)
    return grow_target(EXAMPLES / "target", directory / "target", TargetShape(GROWTH_FACTOR))


def _stream(engine: Engine, prompt: Prompt, sampling: dict[str, Any], style: color.Style) -> None:
    def show(text: str, drafted: bool) -> None:
        print(style.paint(text, style.drafted) if drafted and text else text, end="", flush=True)

    print(style.paint(prompt.text or "", style.prompt), end="", flush=True)
    engine.generate([prompt], sampling, on_piece=show)
    if style.drafted:
        drafted = style.paint("this colour", style.drafted)
        print(f"\n\n({drafted}: drafted and accepted; the rest: the target's own choice)\n")
    else:
        print("\n")


def _answers(generations: Iterable[Generation]) -> list[Answer]:
    return [answer for generation in generations for answer in generation.answers]


def _refuse_errors(answers: list[Answer]) -> None:
    for number, answer in enumerate(answers, start=1):
        if answer.error is not None:
            raise CommandError(f"prompt {number}: {answer.error}")


def _speeds(rounds: race.Rounds) -> list[float]:
    """Return the tokens/s of every prompt in every round."""
    return [generation.num_tokens / generation.seconds for generation in chain.from_iterable(rounds)]


def _speedup(rounds: dict[str, race.Rounds], name: str) -> float:
    """Return the median of the ratios to the baseline at the same prompt in the same round.

    One stalled measurement moves one ratio, and what slows the machine for longer slows both sides of a ratio.
    """
    # engines that ran one after another may differ in rounds: what has no counterpart is left out
    pairs = zip(_speeds(rounds[name]), _speeds(rounds["baseline"]), strict=False)
    return median(own / baseline for own, baseline in pairs)


def _mean_acceptance_length(rounds: race.Rounds) -> float:
    # an answer of one token comes from the prompt's step alone
    return tokens_per_step(_answers(chain.from_iterable(rounds))) or 1.0


def _is_identical(rounds: dict[str, race.Rounds], name: str) -> bool:
    expected = [answer.token_ids for answer in _answers(rounds["baseline"][0])]
    return all([answer.token_ids for answer in _answers(generations)] == expected for generations in rounds[name])


def _render(rounds: dict[str, race.Rounds]) -> str:
    rows = []
    for name, own in rounds.items():
        speed, speedup = table.number(median(_speeds(own)), 1), table.number(_speedup(rounds, name), 2, "x")
        length = table.number(_mean_acceptance_length(own))
        output = "identical" if _is_identical(rounds, name) else "DIFFERENT"
        rows.append((race.LABELS[name], speed, length, speedup, output))
    return table.render(("", "tokens/s", "tokens per step", "speed-up", "output"), rows)
