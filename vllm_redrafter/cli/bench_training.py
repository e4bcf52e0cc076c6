"""`bench training`: what a training step costs beside the target's own forward."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vllm_redrafter.cli import libraries, options, table
from vllm_redrafter.cli.errors import CommandError


def add_parser(benches: Any) -> None:
    """Add the sub-command."""
    parser = benches.add_parser(
        "training",
        help="memory and time of a training step beside the target's own forward",
        description="Measures the target's forward over a batch of random tokens, then a training step with each loss.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", metavar="T", required=True, help="directory or Hub id of the target model")
    count = options.positive_int
    parser.add_argument("--batch-size", metavar="N", type=count, default=4, help="sequences (default: 4)")
    parser.add_argument("--length", metavar="N", type=count, default=512, help="tokens of each (default: 512)")
    parser.add_argument("--exit-dim", metavar="N", type=count, help="width of blocks and head")
    parser.add_argument("--dtype", choices=options.DTYPES, default="auto", help="of the target")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    options.check_model("--target", arguments.target)
    libraries.require_training()
    from vllm_redrafter import provenance
    from vllm_redrafter.bench import training
    from vllm_redrafter.training.recipe import Recipe
    from vllm_redrafter.training.run import load_target

    try:
        target, _ = load_target(arguments.target, dtype=arguments.dtype)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None
    recipe = Recipe(exit_dim=arguments.exit_dim)
    forward, *steps = training.measure(target, recipe, num_sequences=arguments.batch_size, length=arguments.length)
    rows = [["", "peak MiB", "of the forward + one chunk", "seconds"]]
    rows.append([forward.name, f"{forward.peak_bytes / 2**20:.0f}", "", f"{forward.seconds:.3f}"])
    shares = {}
    for step in steps:
        shares[step.name] = step.peak_bytes / (forward.peak_bytes + step.chunk_bytes)
        rows.append([step.name, f"{step.peak_bytes / 2**20:.0f}", f"{shares[step.name]:.2f}x", f"{step.seconds:.3f}"])
    print(table.render(rows[0], rows[1:]))
    told = {"costs": [cost._asdict() for cost in (forward, *steps)], "of_forward_and_chunk": shares}
    print(json.dumps(told | {"provenance": provenance.describe()}))
    return 0
