"""`doctor`: what is installed, what the plugin finds in it, and what would stop it from serving."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any

from vllm_redrafter.cli import environment, table
from vllm_redrafter.cli.environment import PROBLEM
from vllm_redrafter.cli.errors import FAILED


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "doctor",
        help="check versions, platform and patches",
        description="Says what is installed and what would stop serving; changes nothing.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    print("importing torch and vLLM, which takes a while", file=sys.stderr)
    # vLLM logs to what stdout is when it is imported
    with contextlib.redirect_stdout(sys.stderr):
        findings = environment.examine()
        unsupported = environment.unsupported()
    print(table.render(("check", "", "found"), [finding[:3] for finding in findings], left=3))
    remedies = [(finding.name, finding.remedy) for finding in findings if finding.remedy]
    if remedies:
        print("\n" + table.render(("about", "what to do"), remedies, left=2))
    if unsupported:
        print("\n" + table.render(("not supported", "because"), unsupported, left=2))
    problems = [f"{finding.name}: {finding.found}" for finding in findings if finding.state == PROBLEM]
    print(json.dumps({"ok": not problems, "problems": problems}))
    return FAILED if problems else 0
