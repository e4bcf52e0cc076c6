"""`bench grow`: a small target and its drafter made large without changing what they compute."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_redrafter.cli import options
from vllm_redrafter.cli.errors import CommandError


def add_parser(benches: Any) -> None:
    """Add the sub-command."""
    parser = benches.add_parser(
        "grow",
        help="make a small target and its drafter large without changing what they compute",
        description="Makes a small Llama-like target and its drafter large without changing what they compute: a step "
        "costs what the large shape costs, and drafts are accepted as often as the small drafter's.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", metavar="DIR", required=True, type=Path, help="directory of the small target")
    parser.add_argument("--drafter", metavar="DIR", type=Path, help="directory of its drafter")
    parser.add_argument(
        "--output", metavar="DIR", required=True, type=Path, help="DIR/target and DIR/drafter are written"
    )
    parser.add_argument(
        "--factor", metavar="K", type=options.positive_int, default=4, help="times as wide as before (default: 4)"
    )
    for name, default in (
        ("layers", "twice as many"),
        ("heads", "K times as many"),
        ("kv-heads", "K times as many"),
        ("intermediate", "K times as wide an MLP"),
        ("head-size", "as it is; heads grow by whole multiples"),
        ("positions", "as many as there are"),
    ):
        parser.add_argument(f"--{name}", metavar="N", type=options.positive_int, help=f"default: {default}")
    parser.add_argument(
        "--keep-exit",
        action="store_true",
        help="give a drafter without an input projection one, instead of making its blocks and head as wide",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from vllm_redrafter.bench.grow import TargetShape, grow_drafter, grow_target

    shape = TargetShape(
        arguments.factor,
        arguments.layers,
        arguments.heads,
        arguments.kv_heads,
        arguments.intermediate,
        arguments.head_size,
        arguments.positions,
    )
    target, drafter = arguments.output / "target", arguments.output / "drafter"
    grown: dict[str, Any] = {}
    try:
        grown |= {"target": str(target), "target_parameters": grow_target(arguments.target, target, shape)}
        print(f"{target}: {grown['target_parameters'] / 1e6:.1f}M parameters")
        if arguments.drafter is not None:
            size = grow_drafter(arguments.drafter, drafter, arguments.factor, keep_exit=arguments.keep_exit)
            grown |= {"drafter": str(drafter), "drafter_parameters": size}
            print(f"{drafter}: {size / 1e6:.1f}M parameters")
    except ValueError as error:
        raise CommandError(str(error)) from None
    print(json.dumps(grown))
    return 0
