"""Answering whole conversations in batches, and writing the answers in the order of the input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from vllm_redrafter.cli.engine import Engine
from vllm_redrafter.cli.errors import CommandError
from vllm_redrafter.cli.generation import Answer, Generation, Prompt, join, merge
from vllm_redrafter.cli.progress import Progress
from vllm_redrafter.cli.prompts import Conversation

NO_EARLIER_ANSWER = "an earlier turn of this conversation has no answer"


class AnswerWriter:
    """Writes answers as JSONL to a file, or as text to stdout; a context manager that closes the file."""

    def __init__(self, path: Path | None, method: str) -> None:
        self._path = path
        self._method = method
        self._file: TextIO | None = None

    def __enter__(self) -> AnswerWriter:
        if self._path is not None:
            try:
                self._file = self._path.open("w", encoding="utf-8")
            except OSError as error:
                raise CommandError(f"cannot write {str(self._path)!r}: {error.strerror}") from None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, prompt: str, answer: Answer, turn: int) -> None:
        """Write one answer; both kinds of output are complete up to here if the program ends."""
        if self._file is None:
            text = answer.text if answer.error is None else f"(no answer: {answer.error})"
            print(f"> {prompt}\n{text}\n", flush=True)
        else:
            print(json.dumps(self.row(prompt, answer, turn), ensure_ascii=False), file=self._file, flush=True)

    def row(self, prompt: str, answer: Answer, turn: int) -> dict[str, Any]:
        """Return what a line of the file holds; `error` is there only where there is no answer."""
        row = {
            "prompt": prompt,
            "response": answer.text if answer.error is None else None,
            "method": self._method,
            "tokens": len(answer.token_ids),
            "tokens_per_step": answer.tokens_per_step,
            "seconds": answer.seconds,
            "turn": turn,
        }
        return row if answer.error is None else {**row, "error": answer.error}

    @property
    def is_stdout(self) -> bool:
        """Whether answers are printed."""
        return self._path is None


def answer_all(
    engine: Engine,
    conversations: Sequence[Conversation],
    sampling: dict[str, Any],
    writer: AnswerWriter,
    progress: Progress,
    *,
    raw: bool,
) -> Generation:
    """Answer every turn of every conversation: first turns together, then second ones, and so on."""
    answered: list[list[Answer]] = [[] for _ in conversations]
    total = sum(len(conversation.turns) for conversation in conversations)
    generations = []
    next_to_write = 0

    def write_complete() -> None:
        nonlocal next_to_write
        while next_to_write < len(conversations):
            turns, answers = conversations[next_to_write].turns, answered[next_to_write]
            if len(answers) < len(turns):
                return
            if writer.is_stdout:
                progress.clear()
            for turn, (prompt, answer) in enumerate(zip(turns, answers, strict=True), start=1):
                writer.write(prompt, answer, turn)
            next_to_write += 1

    for turn in range(max(len(conversation.turns) for conversation in conversations)):
        members = [index for index, conversation in enumerate(conversations) if turn < len(conversation.turns)]
        blocked = [index for index in members if any(answer.error is not None for answer in answered[index])]
        open_members = [index for index in members if index not in blocked]
        for index in blocked:
            answered[index].append(Answer("", [], 0, 0.0, NO_EARLIER_ANSWER))
        generations.append(Generation([answered[index][-1] for index in blocked], 0.0, {}))

        def keep(number: int, answer: Answer, open_members: list[int] = open_members) -> None:
            answered[open_members[number]].append(answer)
            progress.count("answered", sum(len(answers) for answers in answered), total)
            write_complete()

        prompts = [
            build_prompt(conversations[i].turns[: turn + 1], answered[i], system=conversations[i].system, raw=raw)
            for i in open_members
        ]
        generations.append(engine.generate(prompts, sampling, on_answer=keep))
        write_complete()
    return merge(generations)


def build_prompt(turns: Sequence[str], answers: Sequence[Answer], *, system: str = "", raw: bool) -> Prompt:
    """Return the prompt of the last turn, after what the system says and the turns and answers before it."""
    messages = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        if number < len(answers):
            messages.append({"role": "assistant", "content": answers[number].text})
    return Prompt(text=join(messages)) if raw else Prompt(messages=tuple(messages))
