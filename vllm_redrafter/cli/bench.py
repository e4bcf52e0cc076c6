"""`vllm-redrafter bench`: models to measure on, and speed side by side with plain vLLM."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_redrafter.cli.errors import CommandError
from vllm_redrafter.cli.options import positive_int


def add_parser(commands: Any) -> None:
    """Add the command and its own sub-commands."""
    parser = commands.add_parser("bench", help="measure speed, and make models to measure on", allow_abbrev=False)
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    _add_grow(benches)


def _add_grow(benches: Any) -> None:
    parser = benches.add_parser(
        "grow",
        help="make a small target and its drafter large without changing what they compute",
        description="Makes a small Llama-like target and its drafter large without changing what they compute: steps "
        "cost what the large shape costs, and drafts are accepted as often as the small drafter's are.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", metavar="DIR", required=True, type=Path, help="directory of the small target")
    parser.add_argument("--drafter", metavar="DIR", type=Path, help="directory of its drafter")
    parser.add_argument(
        "--output", metavar="DIR", required=True, type=Path, help="where DIR/target and DIR/drafter are written"
    )
    parser.add_argument(
        "--factor", metavar="K", type=positive_int, default=4, help="times as wide as before (default: 4)"
    )
    parser.add_argument("--layers", metavar="N", type=positive_int, help="layers (default: twice as many)")
    parser.add_argument("--heads", metavar="N", type=positive_int, help="query heads (default: K times as many)")
    parser.add_argument("--kv-heads", metavar="N", type=positive_int, help="KV heads (default: K times as many)")
    parser.add_argument("--intermediate", metavar="N", type=positive_int, help="MLP width (default: K times as wide)")
    parser.set_defaults(run=run_grow)


def run_grow(arguments: argparse.Namespace) -> int:
    """Grow the pair; the last line on stdout is JSON."""
    from vllm_redrafter.bench.grow import TargetShape, grow_drafter, grow_target

    shape = TargetShape(arguments.factor, arguments.layers, arguments.heads, arguments.kv_heads, arguments.intermediate)
    result: dict[str, Any] = {}
    try:
        result["target"] = str(arguments.output / "target")
        result["target_parameters"] = grow_target(arguments.target, arguments.output / "target", shape)
        print(f"{result['target']}: {result['target_parameters'] / 1e6:.1f}M parameters")
        if arguments.drafter is not None:
            result["drafter"] = str(arguments.output / "drafter")
            result["drafter_parameters"] = grow_drafter(arguments.drafter, arguments.output / "drafter", shape.factor)
            print(f"{result['drafter']}: {result['drafter_parameters'] / 1e6:.1f}M parameters")
    except ValueError as error:
        raise CommandError(str(error)) from None
    print(json.dumps(result))
    return 0
