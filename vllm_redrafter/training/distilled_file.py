"""The file that distillation writes, with the one beside it of what could not be answered.

A conversation is written when it is finished, in one piece: a run that is killed loses those under way, and the next
one goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_redrafter.training.dialogue import Dialogue


class DistilledFile:
    """Training data under way; use as a context manager.

    Args:
        path: where records go; what was not answered goes to the same name with `.failed` before `.jsonl`.
        made_by: target and sampling, kept in every record; a file is not gone on with under others.

    Raises:
        ValueError: what is there was not written by a run with these settings.
        OSError: the files cannot be written.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        self.path = path
        self.failed_path = failed_path(path)
        self.num_records = 0
        self.num_failed = 0
        self.num_tokens = 0
        self._made_by = dict(made_by)
        self._turns: dict[int, list[str]] = {}
        """What was said in every conversation that is finished, by its index."""
        for row in _rows(path):
            self._recall(row)
        for row in _rows(self.failed_path):
            self.num_failed += 1
            # of one that failed later, the answers are written after this: without them it was not finished
            if row["turn"] == 1:
                self._turns[row["index"]] = row["turns"]
        # unbuffered: a record is one write, which is done or not when the process is killed
        self._file = path.open("ab", buffering=0)
        self._failed = self.failed_path.open("ab", buffering=0)

    def __enter__(self) -> DistilledFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._failed.close()

    def has(self, dialogue: Dialogue) -> bool:
        """Return whether a conversation is finished.

        Raises:
            ValueError: another one is, in its place.
        """
        turns = self._turns.get(dialogue.index)
        if turns is not None and turns != list(dialogue.turns[: len(turns)]):
            raise ValueError(
                f"{self.path} answers other prompts (the one with index {dialogue.index} differs): "
                "write to another file or overwrite this one"
            )
        return turns is not None

    def write(self, dialogue: Dialogue, error: str | None = None) -> None:
        """Append a conversation: its answers, and why there are no more of them."""
        if error is not None:
            failed = {"index": dialogue.index, "turns": dialogue.turns, "system": dialogue.system}
            _append(self._failed, [{**failed, "turn": dialogue.num_answered + 1, "reason": error}])
            self.num_failed += 1
        records = [{**record, "made_by": self._made_by} for record in dialogue.records()]
        if records:
            _append(self._file, records)
        self.num_records += len(records)
        self.num_tokens += dialogue.num_tokens

    def _recall(self, row: dict[str, Any]) -> None:
        if row.get("made_by") != self._made_by:
            raise ValueError(
                f"{self.path} was made by {row.get('made_by')}, but this run is {self._made_by}: "
                "use the same settings, write to another file or overwrite this one"
            )
        self.num_records += 1
        self.num_tokens += sum(end - start for start, end in row["target_spans"])
        self._turns[row["index"]] = [said["content"] for said in row["messages"] if said["role"] == "user"]


def failed_path(path: Path) -> Path:
    """Return where the prompts without an answer go."""
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.failed.jsonl")


def _append(file: Any, rows: list[dict[str, Any]]) -> None:
    file.write("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what is in a file; half a line at its end is cut off."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        complete = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(complete)
                return
            complete += len(line)
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or "index" not in row:
                raise ValueError(f"{path}, line {number}: not written by distill: write to another file")
            yield row
