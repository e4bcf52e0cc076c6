"""A conversation on the terminal: the user's lines from stdin, answers streamed to stdout."""

from __future__ import annotations

import sys
from typing import Any

from vllm_redrafter.cli.answers import AnswerWriter, build_prompt
from vllm_redrafter.cli.engine import Engine
from vllm_redrafter.cli.generation import Answer, Generation, merge

GOODBYES = ("exit", "quit")


def converse(engine: Engine, sampling: dict[str, Any], writer: AnswerWriter, *, raw: bool) -> Generation:
    """Answer the user's lines, each after all before it, until `exit` or the end of stdin."""
    turns: list[str] = []
    answers: list[Answer] = []
    generations = []
    while (line := _read_line()) is not None:
        if not line:
            continue
        generation = engine.generate(
            [build_prompt([*turns, line], answers, raw=raw)], sampling, on_piece=lambda text, _: _show(text)
        )
        generations.append(generation)
        answer = generation.answers[0]
        if answer.error is None:
            print(flush=True)
            turns.append(line)
            answers.append(answer)
        else:
            print(f"{answer.error}; the conversation starts anew", file=sys.stderr)
            turns, answers = [], []
        if not writer.is_stdout:
            writer.write(line, answer, len(turns))
    return merge(generations)


def _read_line() -> str | None:
    """Return what the user says, or None when the user leaves."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return None if not line or line.strip() in GOODBYES else line.strip()


def _show(text: str) -> None:
    print(text, end="", flush=True)
