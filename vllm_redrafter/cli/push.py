"""`push`: a drafter goes to the Hugging Face Hub, with its model card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_redrafter.cli.errors import CommandError


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "push",
        help="upload a drafter to the Hub, with its model card",
        description=(
            "Uploads a drafter with a model card made from its config, provenance.json and evaluation.json; "
            "a README.md that stands in D is uploaded as it is."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("directory", metavar="D", type=Path, help="directory of the drafter, in our format")
    parser.add_argument("repository", metavar="USER/NAME", help="repository; made, public, unless it is there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made unless it is there (default: main)")
    parser.add_argument("--message", metavar="TEXT", default="Upload drafter", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="print the model card, upload nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from vllm_redrafter.core import checkpoint, hub
    from vllm_redrafter.training import publish

    try:
        if arguments.dry_run:
            print(publish.card(arguments.directory, arguments.repository))
            return 0
        url = publish.push(
            arguments.directory,
            arguments.repository,
            private=arguments.private,
            revision=arguments.revision,
            message=arguments.message,
        )
        target = checkpoint.load_config(arguments.directory).verifier
    except ValueError as error:
        raise CommandError(str(error)) from None
    if target is None or not hub.is_hub_id(target):
        named = "no target" if target is None else f"the target {target!r}"
        print(
            f"note: the config names {named}, so that the drafter cannot be served by its name alone: "
            "record the target's Hub id with `vllm-redrafter convert --target`, and push again"
        )
    print(json.dumps({"repository": arguments.repository, "commit": url}))
    return 0
