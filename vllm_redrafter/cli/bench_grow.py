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
    ):
        parser.add_argument(f"--{name}", metavar="N", type=options.positive_int, help=f"default: {default}")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from vllm_redrafter.bench.grow import TargetShape, grow_drafter, grow_target

    shape = TargetShape(arguments.factor, arguments.layers, arguments.heads, arguments.kv_heads, arguments.intermediate)
    grown: dict[str, Any] = {}
    try:
        for name in ("target", "drafter"):
            source: Path | None = getattr(arguments, name)
            if source is None:
                continue
            output = arguments.output / name
            size = (
                grow_target(source, output, shape) if name == "target" else grow_drafter(source, output, shape.factor)
            )
            print(f"{output}: {size / 1e6:.1f}M parameters")
            grown |= {name: str(output), f"{name}_parameters": size}
    except ValueError as error:
        raise CommandError(str(error)) from None
    print(json.dumps(grown))
    return 0
