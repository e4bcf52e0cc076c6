"""Options that several sub-commands share, with their checks."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_redrafter.cli.errors import CommandError

DTYPES = ("float32", "bfloat16", "float16", "auto")
MAX_NODES = 63
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return int(text)


def count(text: str) -> int:
    """Parse an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 0")
    return int(text)


def positive_number(text: str) -> float:
    """Parse a number above 0."""
    value = _float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def node_budget(text: str) -> int:
    """Parse a number of tree nodes, 1..63."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_NODES:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 1 to {MAX_NODES}, a tree's nodes")
    return int(text)


def number(text: str) -> float:
    """Parse a number of at least 0."""
    value = _float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 0")
    return value


def probability(text: str) -> float:
    """Parse a probability, above 0 and at most 1."""
    value = _float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and at most 1")
    return value


def list_of(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Return a parser of values that commas separate."""

    def parse_list(text: str) -> tuple[Any, ...]:
        # in the order given, each once
        return tuple(dict.fromkeys(parse(part.strip()) for part in text.split(",")))

    return parse_list


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def add_pair(parser: argparse.ArgumentParser, *, drafter_required: bool) -> None:
    """Add `--target` and `--drafter`."""
    parser.add_argument("--target", metavar="T", required=True, help="directory or Hub id of the target model")
    parser.add_argument("--drafter", metavar="D", required=drafter_required, help="directory or Hub id of the drafter")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add what every command that starts an engine takes."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="weights and activations (default: float32)")
    parser.add_argument("--verbose", action="store_true", help="show the engines' own logs on stderr")


def check_model(option: str, model: str) -> None:
    """Refuse what is neither a model's directory nor could be a Hub id, before an engine spends a minute on it.

    Raises:
        CommandError: naming the path and what is missing.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CommandError(f"{option}: no config.json in {model!r}: pass the directory of a model")
    elif path.exists():
        raise CommandError(f"{option}: {model!r} is a file: pass the directory of a model")
    elif model.startswith(".") or not _HUB_ID.fullmatch(model):
        raise CommandError(f"{option}: no directory {model!r}: pass a model's directory or a Hub id")


def read_text(option: str, path: Path) -> str:
    """Return a file's text.

    Raises:
        CommandError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{option}: cannot read {str(path)!r} ({error}): pass a text file") from None


def speculative_config(drafter: str, **options: Any) -> dict[str, Any]:
    """Return what vLLM takes as `speculative_config`; options that are None are left to the drafter's config."""
    given = {name: value for name, value in options.items() if value is not None}
    return {"method": "redrafter", "model": drafter, **given}
