"""`train`: a drafter for a target, from text that the target (or anybody) wrote."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from vllm_redrafter.cli import libraries, options
from vllm_redrafter.cli.errors import USAGE, CommandError
from vllm_redrafter.cli.pair import serving
from vllm_redrafter.cli.progress import Progress

EXAMPLE_TARGET = Path(__file__).resolve().parents[2] / "examples" / "models" / "target"


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "train",
        help="make a drafter for a target",
        description="Trains a drafter on files that `distill` wrote, on conversations or on plain text. The target "
        "stays as it is. What OUTPUT holds at the end serves as it is; --resume goes on where a run was stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", metavar="T", help="directory or Hub id of the target model")
    parser.add_argument("--target-revision", metavar="R", help="branch, tag or commit of a target on the Hub")
    parser.add_argument(
        "--data", metavar="FILE", action="append", default=[], help="JSONL, text or data set; may be repeated"
    )
    parser.add_argument("--output", metavar="D", type=Path, help="directory of the drafter")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small drafter in minutes: without --target for the example target, without --data from text that the "
        "target writes itself",
    )
    present = parser.add_mutually_exclusive_group()
    present.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT")
    present.add_argument("--overwrite", action="store_true", help="start anew in an OUTPUT that is not empty")
    _add_model(parser.add_argument_group("the drafter"))
    _add_loss(parser.add_argument_group("the loss"))
    _add_run(parser.add_argument_group("the run"))
    parser.set_defaults(run=run)


def _add_model(group: Any) -> None:
    count = options.positive_int
    _add(group, "exit-dim", metavar="N", type=count, help="width of blocks and head (default: twice the hidden size)")
    _add(group, "num-draft-layers", metavar="N", type=options.count, help="residual blocks (default: 2)")
    _add(group, "no-rnn", action="store_true", help="sum embeddings instead of running an RNN over them")
    _add(
        group,
        "draft-vocab-size",
        metavar="N",
        type=_vocab_size,
        help="tokens that the head knows, or `all` (default: as many as make up 98%% of the data)",
    )
    _add(group, "tie-head", action="store_true", help="use the target's own head")
    layers = options.list_of(options.count)
    _add(group, "fused-layers", metavar="N,...", type=layers, help="target layers it sees besides the last (from 0)")
    _add(group, "beam-width", metavar="N", type=options.node_budget, help="beams searched by default (default: 4)")
    _add(group, "num-speculative-tokens", metavar="N", type=options.node_budget, help="tree nodes (default: 8)")


def _vocab_size(text: str) -> int | str:
    if text == "all":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer of at least 1 nor 'all'")
    return int(text)


def _add_loss(group: Any) -> None:
    _add(group, "loss", choices=("ce", "kl", "lk"), help="data, target's distribution, accepted mass (default: kl)")
    _add(group, "num-offsets", metavar="N", type=options.node_budget, help="tokens ahead that are learnt (default: 6)")
    _add(group, "decay", metavar="X", type=options.positive_number, help="weight of an offset to the one before (1.0)")
    _add(group, "reach", metavar="P", type=float, help="text less likely than P is followed no deeper (default: 0.05)")
    _add(group, "own-tokens", metavar="P", type=float, help="share of the drafter's own tokens in the state (0.0)")


def _add_run(group: Any) -> None:
    count = options.positive_int
    _add(group, "max-length", metavar="N", type=count, help="tokens of a packed sequence (default: 2048 at most)")
    _add(group, "epochs", metavar="X", type=options.positive_number, help="passes over the data (3, or 12M tokens)")
    _add(group, "remembered-gib", metavar="X", type=options.number, help="memory of a process for hidden states (4)")
    _add(group, "max-steps", metavar="N", type=count, help="steps instead of epochs")
    _add(group, "batch-size", metavar="N", type=count, help="packed sequences per process and pass (1024 tokens)")
    _add(group, "gradient-accumulation", metavar="N", type=count, help="passes per step (default: 1)")
    _add(group, "learning-rate", metavar="X", type=options.positive_number, help="its peak (0.06 / sqrt(hidden size))")
    _add(group, "patience", metavar="N", type=count, help="stop after N evaluations without a gain (default: never)")
    _add(group, "num-evaluations", metavar="N", type=count, help="evaluations and checkpoints (default: 10)")
    _add(group, "seed", metavar="N", type=int, help="(default: 0)")
    _add(
        group, "report-to", metavar="WHERE", action="append", choices=("tensorboard", "wandb"), help="figures go there"
    )
    _add(group, "licence", metavar="ID", help="of the drafter, told on its card")
    _add(group, "chat-template", metavar="FILE", type=Path, help="Jinja template with generation spans")
    _add(group, "text-separator", metavar="TEXT", help="between the documents of a text file (<|endoftext|>)")
    group.add_argument(
        "--dtype",
        choices=options.DTYPES,
        default="auto",
        help="of the target (default: its own on a GPU, float32 on a CPU)",
    )
    _add(group, "bf16", action=argparse.BooleanOptionalAction, help="compute in bf16 (default: where it is native)")


def _add(group: Any, name: str, **settings: Any) -> None:
    """Add an option that may be spelt with underscores, as trainers spell theirs; what is not given is None."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
    group.add_argument(*spellings, default=None, **settings)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    target_name = _target(arguments)
    if arguments.output is None:
        raise CommandError("--output is missing: name a directory for the drafter", USAGE)
    if not arguments.data and not arguments.quick:
        raise CommandError("--data is missing: pass a file of text, or --quick to let the target write it", USAGE)
    libraries.require_training()
    from vllm_redrafter.cli.training_progress import TrainingProgress
    from vllm_redrafter.training import run as training
    from vllm_redrafter.training.recipe import QUICK, Recipe, choose

    is_first = os.environ.get("RANK", "0") == "0"
    progress = Progress(quiet=not is_first)
    try:
        training.prepare_output(arguments.output, overwrite=arguments.overwrite, resume=arguments.resume)
        progress.say(f"loading {target_name}")
        target, tokenizer = training.load_target(target_name, arguments.target_revision, arguments.dtype)
        recipe = choose(QUICK if arguments.quick else Recipe(), _given(arguments), target)
        documents, sources = _documents(arguments, target, tokenizer, recipe.max_length, progress)
        record = {"command": shlex.join(["vllm-redrafter", *sys.argv[1:]]), "data": sources}
        trained = training.train(
            target,
            tokenizer,
            documents,
            arguments.output,
            recipe,
            verifier=target_name,
            record=record | {"target_revision": arguments.target_revision, "licence": arguments.licence},
            resume=arguments.resume,
            callbacks=[TrainingProgress(progress)],
        )
    except (ValueError, FloatingPointError, NotImplementedError, OSError) as error:
        raise CommandError(str(error)) from None
    progress.clear()
    if is_first:
        _tell(trained, target_name)
    return 0


def _target(arguments: argparse.Namespace) -> str:
    if arguments.target is None and not arguments.quick:
        raise CommandError("--target is missing: name the model that the drafter is for", USAGE)
    name = arguments.target or str(EXAMPLE_TARGET)
    options.check_model("--target", name)
    return name


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was given of the recipe, under the names of its fields."""
    names = (
        *("exit_dim", "num_draft_layers", "draft_vocab_size", "fused_layers", "beam_width", "num_speculative_tokens"),
        *("loss", "num_offsets", "decay", "reach", "own_tokens", "max_length", "epochs", "max_steps", "remembered_gib"),
        *("batch_size", "gradient_accumulation", "learning_rate", "patience", "num_evaluations", "seed", "bf16"),
    )
    given = {name: getattr(arguments, name) for name in names}
    given["rnn"] = False if arguments.no_rnn else None
    given["tie_lm_head"] = arguments.tie_head
    given["report_to"] = tuple(arguments.report_to) if arguments.report_to else None
    return {name: value for name, value in given.items() if value is not None}


def _documents(
    arguments: argparse.Namespace, target: Any, tokenizer: Any, max_length: int, progress: Progress
) -> tuple[list[Any], list[dict[str, str | None]]]:
    """Return the documents, and what `provenance.json` says of where they come from."""
    from vllm_redrafter.training import corpus, quick
    from vllm_redrafter.training.run import digest

    if not arguments.data:
        progress.say(f"the target writes training text for {quick.SECONDS} s")
        return quick.write_documents(target, tokenizer), [{"name": "written by the target", "sha256": None}]
    template = None
    if arguments.chat_template is not None:
        template = options.read_text("--chat-template", arguments.chat_template)
    loaded = corpus.load_corpus(
        arguments.data,
        tokenizer,
        max_length=max_length,
        chat_template=template,
        text_separator=arguments.text_separator,
    )
    progress.say(f"{len(loaded.documents)} documents; dropped: {corpus.describe(loaded.dropped) or 'none'}")
    paths = [Path(name) for name in arguments.data]
    return loaded.documents, [{"name": path.name, "sha256": digest(path) if path.is_file() else None} for path in paths]


def _tell(trained: Any, target: str) -> None:
    """Print what there is now and how it is served; the last line is JSON."""
    if trained.stopped_early:
        print(f"stopped at step {trained.num_steps}: the same command with --resume goes on")
    if trained.acceptance_length is not None:
        print(f"mean acceptance length on held-out texts, greedy: {trained.acceptance_length:.2f}")
    if trained.coverage < 1:
        print(f"{1 - trained.coverage:.1%} of the text are tokens that the drafter does not know (--draft-vocab-size)")
    print(shlex.join(["vllm", *serving(target, str(trained.directory))]))
    told = {
        "drafter": str(trained.directory),
        "num_steps": trained.num_steps,
        "stopped": trained.stopped_early,
        "mean_acceptance_length": trained.acceptance_length,
    }
    print(json.dumps(told))
