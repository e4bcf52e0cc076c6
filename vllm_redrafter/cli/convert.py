"""`convert`: other programs' drafters become ours, and ours become Apple's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_redrafter.cli.errors import USAGE, CommandError

# spelled out: what lists them imports torch
SOURCE_FORMATS = ("redrafter", "apple", "trtllm", "eplatero")
TARGET_FORMATS = ("redrafter", "apple")


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "convert",
        help="read other programs' drafters, write Apple's format",
        description="Writes a drafter in another format; its tensors stay as they are, bit for bit.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="directory or Hub id of the drafter")
    parser.add_argument("directory", metavar="D", type=Path, help="directory to write")
    parser.add_argument(
        "--from",
        dest="source_format",
        choices=SOURCE_FORMATS,
        help="format of SRC: ours, Apple's, TensorRT-LLM's or that of eplatero97's speculators (default: redrafter)",
    )
    parser.add_argument("--to", dest="target_format", choices=TARGET_FORMATS, help="of D (default: redrafter)")
    parser.add_argument("--target", metavar="T", help="the target's Hub id or directory, for `vllm serve D` to find it")
    parser.add_argument("--overwrite", action="store_true", help="replace a drafter that stands in D")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    source_format = arguments.source_format or "redrafter"
    target_format = arguments.target_format or "redrafter"
    # with another target recorded the same format is another checkpoint
    if source_format == target_format and arguments.target is None:
        raise CommandError(
            f"from {source_format} to {target_format} there is nothing to convert: "
            "pass --from with the format of SRC, --to apple, or --target",
            USAGE,
        )
    from vllm_redrafter.core.conversion import convert

    try:
        drafter = convert(
            arguments.source,
            arguments.directory,
            source_format=source_format,
            target_format=target_format,
            verifier=arguments.target,
            overwrite=arguments.overwrite,
        )
    except ValueError as error:
        raise CommandError(str(error)) from None
    config = drafter.config
    if target_format == "apple":
        print(
            f"note: Apple's format holds neither beam shape nor target; pass --beam_width={config.beam_width} "
            f"--beam_length={config.draft_length + 1} to its programs"
        )
    elif config.verifier is None:
        print("note: the config names no target: repeat with --target, or always pass both models to vLLM")
    summary = {
        "directory": str(arguments.directory),
        "from": source_format,
        "to": target_format,
        "num_parameters": sum(parameter.numel() for parameter in drafter.parameters()),
        "verifier": config.verifier,
    }
    print(json.dumps(summary))
    return 0
