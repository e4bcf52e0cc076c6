"""Files of prompts: plain text (one per line), JSONL, MT-Bench and ShareGPT, read into conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from vllm_redrafter.cli.errors import CommandError

_PROMPT_KEYS = ("prompt", "text", "instruction", "question")
_HUMAN = ("human", "user")


class Conversation(NamedTuple):
    """What a user says, turn by turn; each turn is said after the answer to the one before."""

    turns: tuple[str, ...]


def read_conversations(path: Path) -> list[Conversation]:
    """Return the conversations of a file, in its order.

    `.json` holds a list and `.jsonl` an object per line; anything else is plain text, one prompt per line.

    Raises:
        CommandError: the file is missing, empty or malformed; the line or the entry is named.
    """
    text = _read(path)
    if not text.strip():
        raise CommandError(f"{path} is empty: put one prompt on each line")
    suffix = path.suffix.lower()
    if suffix == ".json":
        entries = enumerate(_parse_list(text, path), 1)
        return [_parse_entry(entry, f"{path}, entry {number}") for number, entry in entries]
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if suffix == ".jsonl":
        return [_parse_entry(_parse_json(line, path, number), f"{path}, line {number}") for number, line in lines]
    return [Conversation((line,)) for _, line in lines]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CommandError(f"no file {str(path)!r}: pass a file of prompts") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is no UTF-8 text (byte {error.start}): convert or unpack it first") from None
    except OSError as error:
        raise CommandError(f"cannot read {str(path)!r}: {error.strerror}") from None


def _parse_list(text: str, path: Path) -> list[Any]:
    entries = _parse_json(text, path, 1)
    if not isinstance(entries, list):
        raise CommandError(f"{path} holds no list: name it .jsonl if it has one object per line")
    if not entries:
        raise CommandError(f"{path} holds an empty list: put at least one prompt into it")
    return entries


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise CommandError(f"{path}, line {line}: no JSON ({error.msg}, column {error.colno}): mend it") from None


def _parse_entry(entry: Any, where: str) -> Conversation:
    if isinstance(entry, str):
        return Conversation((entry,))
    if not isinstance(entry, dict):
        raise CommandError(f"{where}: {type(entry).__name__}, but each entry must be an object or a string")
    if "turns" in entry:
        return _checked(entry["turns"], f"{where}, turns")
    if "conversations" in entry:
        return _checked(_human_turns(entry["conversations"], where), f"{where}, conversations")
    for key in _PROMPT_KEYS:
        if key in entry:
            # Alpaca's files keep what an instruction is about beside it
            parts = [entry[key], entry["input"]] if key == "instruction" and entry.get("input") else [entry[key]]
            return Conversation(("\n\n".join(_checked(parts, f"{where}, {key}").turns),))
    known = ", ".join((*_PROMPT_KEYS, "turns", "conversations"))
    raise CommandError(f"{where}: no prompt among the keys {sorted(entry)}: one of {known} must be there")


def _human_turns(messages: Any, where: str) -> list[Any]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise CommandError(f"{where}: conversations must be a list of objects with from and value")
    return [message.get("value") for message in messages if message.get("from") in _HUMAN]


def _checked(turns: Any, where: str) -> Conversation:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise CommandError(f"{where}: no text of a user in it: each must be a string that is not empty")
    return Conversation(tuple(turns))
