"""`evaluate`: how good a drafter is before it serves, on answers that its target gives to held-out prompts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_redrafter.cli import libraries, options, table
from vllm_redrafter.cli.errors import CommandError
from vllm_redrafter.cli.progress import Progress

NODES = (4, 8, 16, 32)
TEMPERATURES = (0.0, 1.0)


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "evaluate",
        help="tell how good a drafter is before it serves",
        description="Lets the target answer held-out prompts, greedily and sampled, and tells how many tokens a "
        "verification of each tree would yield, with the walk that serving does, and how often each drafted token is "
        "right. What it finds is written to evaluation.json in the drafter's directory, for the model card.",
        allow_abbrev=False,
    )
    options.add_pair(parser, drafter_required=True)
    parser.add_argument(
        "--data", metavar="FILE", action="append", required=True, help="what `train` takes; may be repeated"
    )
    count = options.positive_int
    parser.add_argument("--num-prompts", metavar="N", type=count, default=64, help="of each source (default: 64)")
    parser.add_argument("--max-tokens", metavar="N", type=count, default=128, help="per answer (default: 128)")
    parser.add_argument(
        "--nodes",
        metavar="N,...",
        type=options.list_of(options.node_budget),
        default=NODES,
        help="tree sizes (default: 4,8,16,32)",
    )
    parser.add_argument(
        "--beam-width", metavar="N", type=options.node_budget, help="beams searched (default: the drafter's own)"
    )
    parser.add_argument(
        "--draft-length", metavar="N", type=options.node_budget, help="tokens per beam (default: the drafter's own)"
    )
    parser.add_argument(
        "--temperature",
        metavar="X,...",
        type=options.list_of(options.number),
        default=TEMPERATURES,
        help="0 is greedy (default: 0,1)",
    )
    parser.add_argument("--chat-template", metavar="FILE", type=Path, help="Jinja template with generation spans")
    parser.add_argument("--text-separator", metavar="TEXT", help="between the documents of a text file")
    parser.add_argument("--output", metavar="FILE", type=Path, help="(default: evaluation.json beside the drafter)")
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw acceptance by depth and tokens by budget (.svg)"
    )
    parser.add_argument("--dtype", choices=options.DTYPES, default="auto", help="of the target")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    options.check_model("--target", arguments.target)
    options.check_model("--drafter", arguments.drafter)
    output = _output(arguments)
    if arguments.plot is not None:
        libraries.require("matplotlib", "bench", "--plot")
    libraries.require_training()
    from vllm_redrafter.training.evaluation import to_json

    progress = Progress()
    try:
        offsets, rows = _evaluate(arguments, progress)
        told = to_json(offsets, rows)
        if output is not None:
            output.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if arguments.plot is not None:
            from vllm_redrafter.training.figures import draw

            draw(rows, arguments.plot)
    except (ValueError, NotImplementedError, OSError) as error:
        raise CommandError(str(error)) from None
    progress.clear()
    print(_render_acceptance(rows))
    print()
    print(_render_accuracies(offsets))
    # the first temperature comes first, and of it the drafter's own beams; their largest tree is the last of those
    first = rows[0]
    largest = next(row for row in rows if row.num_nodes == max(arguments.nodes) and row.source == first.source)
    summary = {"mean_acceptance_length": largest.mean_acceptance_length, "num_nodes": largest.num_nodes}
    print(json.dumps(summary | told))
    return 0


def _output(arguments: argparse.Namespace) -> Path | None:
    if arguments.output is not None:
        return Path(arguments.output)
    directory = Path(arguments.drafter)
    # a drafter of the Hub lies in a cache that is not ours to write to
    return directory / "evaluation.json" if directory.is_dir() else None


def _evaluate(arguments: argparse.Namespace, progress: Progress) -> tuple[list[Any], list[Any]]:
    from vllm_redrafter.core import checkpoint
    from vllm_redrafter.core.beam_search import BeamShape
    from vllm_redrafter.training import corpus, evaluation, run
    from vllm_redrafter.training.transcripts import transcribe

    drafter = checkpoint.load_drafter(arguments.drafter)
    progress.say(f"loading {arguments.target}")
    target, tokenizer = run.load_target(arguments.target, dtype=arguments.dtype)
    config = drafter.config
    checkpoint.check_against_target(
        config,
        hidden_size=target.head_weight.shape[1],
        vocab_size=target.vocab_size,
        num_layers=target.num_layers,
        target=arguments.target,
    )
    if config.tie_lm_head:
        drafter.tie_head(target.head_weight)
    template = (
        None if arguments.chat_template is None else options.read_text("--chat-template", arguments.chat_template)
    )
    longest = target.max_length or arguments.max_tokens * 8
    loaded = corpus.load_corpus(
        arguments.data, tokenizer, max_length=longest, chat_template=template, text_separator=arguments.text_separator
    )
    prompts = _first_of_each_source(
        run.openings(loaded.documents, longest - arguments.max_tokens), arguments.num_prompts
    )
    if not prompts:
        raise ValueError(
            f"no prompt leaves room for {arguments.max_tokens} tokens within the target's {longest}: ask for fewer"
        )
    budgets = sorted(set(arguments.nodes))
    own = BeamShape(arguments.beam_width or config.beam_width, arguments.draft_length or config.draft_length)
    rows, documents = [], []
    for temperature in arguments.temperature:
        progress.say(f"the target answers {len(prompts)} prompts at temperature {temperature:g}")
        transcripts = transcribe(target, prompts, arguments.max_tokens, temperature=temperature)
        held_out = evaluation.hold_out(target, transcripts, config.fused_layers)
        rows += evaluation.acceptance(drafter, held_out, own, budgets, temperature)
        chains = [budget for budget in budgets if budget <= own.length]
        if own.width > 1 and chains:
            rows += evaluation.acceptance(drafter, held_out, own._replace(width=1), chains, temperature)
        documents += evaluation.as_documents(transcripts)
    return evaluation.accuracies(drafter, target, documents), rows


def _first_of_each_source(prompts: list[Any], num_prompts: int) -> list[Any]:
    taken: dict[str, list[Any]] = {}
    for prompt in prompts:
        of_source = taken.setdefault(prompt.source, [])
        if len(of_source) < num_prompts:
            of_source.append(prompt)
    return [prompt for of_source in taken.values() for prompt in of_source]


def _render_acceptance(rows: list[Any]) -> str:
    header = ["source", "temperature", "draft", "tokens/step", "accepted at depth 1, 2, ..."]
    cells = [
        [
            row.source,
            f"{row.temperature:g}",
            f"{'chain' if row.beam_width == 1 else 'tree'} of {row.num_nodes}",
            f"{row.mean_acceptance_length:.2f}",
            " ".join(f"{share:.0%}" for share in row.by_depth),
        ]
        for row in rows
    ]
    return table.render(header, cells, left=1)


def _render_accuracies(offsets: list[Any]) -> str:
    header = ["token ahead", "right", f"among the best {offsets[0].k}"]
    return table.render(header, [[str(each.offset), f"{each.top1:.1%}", f"{each.topk:.1%}"] for each in offsets])
