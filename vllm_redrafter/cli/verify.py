"""`verify`: proof on the user's own pair of models that the drafter changes nothing but the speed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from vllm_redrafter.cli import options, table
from vllm_redrafter.cli.comparison import Difference, first_difference
from vllm_redrafter.cli.engine import Engine, EngineSpec
from vllm_redrafter.cli.errors import FAILED, CommandError
from vllm_redrafter.cli.generation import Generation, Prompt, merge, tokens_per_step
from vllm_redrafter.cli.pair import check_pair
from vllm_redrafter.cli.progress import Progress
from vllm_redrafter.cli.prompts import read_conversations

PROMPTS = (
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "The three most important things to know about the weather are",
    "Question: What is the capital of France?\nAnswer:",
    "1, 2, 3, 4, 5, 6,",
    "Dear Sir or Madam,\n\nI am writing to you because",
    "A B C A B C A B C A",
    "In this chapter we",
)
CONTEXT_TOKENS = 12


class Check(NamedTuple):
    """One way of generating, run with and without the drafter."""

    name: str
    sampling: dict[str, Any]
    batched: bool = True
    compares_logprobs: bool = False


CHECKS = (
    Check("greedy, one prompt at a time", {"temperature": 0.0}, batched=False),
    Check("greedy, all prompts in one batch", {"temperature": 0.0}),
    Check("seeded sampling, temperature 1", {"temperature": 1.0}),
    Check("seeded sampling, temperature 1, top_p 0.9", {"temperature": 1.0, "top_p": 0.9}),
    Check("greedy with logprobs=5", {"temperature": 0.0, "logprobs": 5}, compares_logprobs=True),
)


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "verify",
        help="prove on your own pair that the drafter changes nothing",
        description="Generates with and without the drafter, in separate processes, and compares token by token.",
        allow_abbrev=False,
    )
    options.add_pair(parser, drafter_required=True)
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="text, JSONL, MT-Bench or ShareGPT")
    parser.add_argument(
        "--max-tokens", metavar="N", type=options.positive_int, default=64, help="per answer (default: 64)"
    )
    parser.add_argument(
        "--num-speculative-tokens",
        metavar="N",
        type=options.node_budget,
        default=8,
        help="tree nodes verified in each step, 1..63 (default: 8)",
    )
    options.add_engine(parser)
    parser.set_defaults(run=run)


def logprob_tolerance(dtype: str) -> float:
    """Return how far log-probabilities may differ: a tree's rows go through matrix products of another shape.

    That changes the order of summation. In float32 it moves a log-probability by some 1e-4, and vLLM's own figures
    differ by up to 1e-3 between batch shapes; in 16 bits a logit near 16 has a spacing of 0.06 (bfloat16).
    """
    return 2e-3 if dtype == "float32" else 1e-1


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    check_pair(arguments.target, arguments.drafter)
    prompts = _read_prompts(arguments.prompts)
    progress = Progress()
    drafter = options.speculative_config(
        arguments.drafter, num_speculative_tokens=arguments.num_speculative_tokens, budget="fixed"
    )

    def started(config: dict[str, Any] | None) -> Engine:
        progress.say(f"starting the engine {'without' if config is None else 'with'} the drafter")
        spec = EngineSpec(arguments.target, config, arguments.dtype, len(prompts), enable_chunked_prefill=False)
        return Engine(spec, verbose=arguments.verbose)

    with started(None) as engine:
        expected = _run_checks(engine, prompts, arguments.max_tokens, "without drafter", progress)
    with started(drafter) as engine:
        found = _run_checks(engine, prompts, arguments.max_tokens, "with drafter", progress)
        differences = _compare(expected, found, logprob_tolerance(arguments.dtype))
        described = _describe_first(differences, expected, engine)
    progress.clear()
    refused = [answer.error for answer in expected[0].answers if answer.error is not None]
    if len(refused) == len(prompts):
        raise CommandError(f"no prompt could be run, so nothing was compared: {refused[0]}")

    print(_render(differences, found))
    for note in _notes(refused, found, described, arguments):
        print(note)
    print(json.dumps(_summary(prompts, found, described)))
    return FAILED if described is not None else 0


def _read_prompts(path: Path | None) -> list[Prompt]:
    texts = PROMPTS if path is None else [conversation.turns[0] for conversation in read_conversations(path)]
    return [Prompt(text, seed=seed) for seed, text in enumerate(texts)]


def _run_checks(
    engine: Engine, prompts: list[Prompt], max_tokens: int, label: str, progress: Progress
) -> list[Generation]:
    generations = []
    for number, check in enumerate(CHECKS):
        progress.count(f"{label}: {check.name}", number, len(CHECKS))
        sampling = {**check.sampling, "max_tokens": max_tokens}
        groups = [prompts] if check.batched else [[prompt] for prompt in prompts]
        generations.append(merge([engine.generate(group, sampling) for group in groups]))
    progress.count(label, len(CHECKS), len(CHECKS))
    return generations


def _compare(expected: list[Generation], found: list[Generation], tolerance: float) -> list[Difference | None]:
    return [
        first_difference(left.answers, right.answers, tolerance if check.compares_logprobs else None)
        for check, left, right in zip(CHECKS, expected, found, strict=True)
    ]


def _describe_first(
    differences: list[Difference | None], expected: list[Generation], engine: Engine
) -> dict[str, Any] | None:
    """Return the first difference with its tokens written out, as it goes into the JSON."""
    for check, difference, generation in zip(CHECKS, differences, expected, strict=True):
        if difference is None:
            continue
        described = {"check": check.name, **difference._asdict()}
        if difference.kind != "error":
            token_ids = generation.answers[difference.prompt_index].token_ids
            context = token_ids[max(0, difference.position - CONTEXT_TOKENS) : difference.position]
            described["context"] = engine.decode([context])[0]
        if difference.kind == "token":
            sides = [side for side in ("expected", "found") if described[side] is not None]
            for side, text in zip(sides, engine.decode([[described[side]] for side in sides]), strict=True):
                described[f"{side}_text"] = text
        return described
    return None


def _render(differences: list[Difference | None], found: list[Generation]) -> str:
    rows = [
        (
            check.name,
            str(generation.num_tokens),
            table.number(tokens_per_step(generation.answers)),
            "identical" if difference is None else f"differs at prompt {difference.prompt_index}",
        )
        for check, difference, generation in zip(CHECKS, differences, found, strict=True)
    ]
    return table.render(("check", "tokens", "tokens per step", "with and without drafter"), rows)


def _notes(
    refused: list[str], found: list[Generation], described: dict[str, Any] | None, arguments: argparse.Namespace
) -> list[str]:
    notes = []
    if refused:
        notes.append(f"note: {len(refused)} of the prompts could not be run, the first because {refused[0]}")
    stats = merge(found).stats
    if not stats.get("num_accepted_tokens"):
        notes.append("note: no drafted token was accepted, so acceptance was not tried: is this the target's drafter?")
    elif not stats.get("num_branch_acceptances"):
        notes.append(
            "note: no accepted path left the best one, so the trees' other branches were not tried: "
            "use more prompts or a larger --num-speculative-tokens"
        )
    if described is not None:
        notes.append(_sentence(described))
        if arguments.dtype != "float32":
            notes.append(
                f"note: in {arguments.dtype} near-ties between tokens flip with the shape of the batch, also without a "
                "drafter: repeat with --dtype float32"
            )
    return notes


def _sentence(described: dict[str, Any]) -> str:
    where = f"first difference: {described['check']}, prompt {described['prompt_index']}"
    if described["kind"] == "error":
        return f"{where}: without drafter {described['expected']!r}, with drafter {described['found']!r}"
    sides = []
    for side in ("expected", "found"):
        if described["kind"] == "logprob":
            sides.append(f"log-probability {described[side]:.5f}")
        elif described[side] is None:
            sides.append("the end of the answer")
        else:
            sides.append(f"{described[f'{side}_text']!r} (token {described[side]})")
    position, context = described["position"], described["context"]
    return f"{where}, position {position}, after {context!r}: without drafter {sides[0]}, with drafter {sides[1]}"


def _summary(prompts: list[Prompt], found: list[Generation], described: dict[str, Any] | None) -> dict[str, Any]:
    whole = merge(found)
    return {
        "identical": described is None,
        "num_prompts": len(prompts),
        "num_checks": len(CHECKS),
        "first_difference": described,
        "mean_acceptance_length": tokens_per_step(whole.answers),
        "num_accepted_tokens": whole.stats.get("num_accepted_tokens", 0),
        "num_branch_acceptances": whole.stats.get("num_branch_acceptances", 0),
    }
