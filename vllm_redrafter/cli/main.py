"""Entry point: reads the command line, runs one sub-command, turns what went wrong into one line and an exit status.

0 done, 1 the command ran and failed, 2 usage, 130 interrupted. Nothing but the standard library is imported until a
sub-command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from vllm_redrafter import __version__
from vllm_redrafter.cli import bench, convert, demo, distill, doctor, evaluate, generate, push, train, verify
from vllm_redrafter.cli.errors import INTERRUPTED, CommandError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole program; a parsed command carries its function as `run`."""
    parser = argparse.ArgumentParser(
        prog="vllm-redrafter",
        description="ReDrafter speculation inside vLLM: the same output, in fewer steps.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (demo, verify, doctor, generate, distill, train, evaluate, convert, push, bench):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        with _interruptible_once():
            status: int = arguments.run(arguments)
            sys.stdout.flush()
        return status
    except CommandError as error:
        print(f"vllm-redrafter {arguments.command}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"vllm-redrafter {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader (`| head`) has gone: what Python flushes at exit must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


@contextlib.contextmanager
def _interruptible_once() -> Iterator[None]:
    """Let SIGINT and SIGTERM unwind the stack, so that engines are ended.

    After the first one both are ignored until the process ends: a second one (`timeout` sends its signal twice, and so
    do impatient users) does not cut the unwinding short.
    """
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        for other in previous:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if not interrupted:
            for number, handler in previous.items():
                signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
