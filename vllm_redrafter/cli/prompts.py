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
    system: str = ""
    """What the file says to the model before the first turn."""


def read_conversations(path: Path) -> list[Conversation]:
    """Return the conversations of a file, in its order.

    Raises:
        CommandError: the file is missing, empty or malformed; the line or the entry is named.
    """
    return [parse_conversation(entry, where) for entry, where in read_entries(path)]


def read_entries(path: Path) -> list[tuple[Any, str]]:
    """Return what a file holds, in its order, and where each entry stands.

    `.json` holds a list and `.jsonl` an object per line; anything else is plain text, one prompt per line.

    Raises:
        CommandError: the file is missing or empty, or a line is no JSON.
    """
    text = _read(path)
    if not text.strip():
        raise CommandError(f"{path} is empty: put one prompt on each line")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return [(entry, f"{path}, entry {number}") for number, entry in enumerate(_parse_list(text, path), 1)]
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if suffix == ".jsonl":
        return [(_parse_json(line, path, number), f"{path}, line {number}") for number, line in lines]
    return [(line, f"{path}, line {number}") for number, line in lines]


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


def parse_conversation(entry: Any, where: str) -> Conversation:
    """Return the conversation of an entry.

    Raises:
        CommandError: nobody says anything in it; the message begins with `where`.
    """
    if isinstance(entry, str):
        return _checked([entry], where)
    if not isinstance(entry, dict):
        raise CommandError(f"{where}: {type(entry).__name__}, but each entry must be an object or a string")
    if "turns" in entry:
        return _checked(entry["turns"], f"{where}, turns")
    if "conversations" in entry:
        return _parse_messages(entry, "conversations", "from", "value", where)
    if "messages" in entry:
        return _parse_messages(entry, "messages", "role", "content", where)
    for key in _PROMPT_KEYS:
        if key in entry:
            # Alpaca's files keep what an instruction is about beside it
            parts = [entry[key], entry["input"]] if key == "instruction" and entry.get("input") else [entry[key]]
            return Conversation(("\n\n".join(_checked(parts, f"{where}, {key}").turns),))
    known = ", ".join((*_PROMPT_KEYS, "turns", "conversations", "messages"))
    raise CommandError(f"{where}: no prompt among the keys {sorted(entry)}: one of {known} must be there")


def _parse_messages(entry: dict[str, Any], key: str, speaker: str, said: str, where: str) -> Conversation:
    messages = entry[key]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise CommandError(f"{where}: {key} must be a list of objects with {speaker} and {said}")
    turns = [message.get(said) for message in messages if message.get(speaker) in _HUMAN]
    system = [message.get(said) for message in messages if message.get(speaker) == "system"]
    checked = _checked(turns, f"{where}, {key}")
    return checked._replace(system="\n\n".join(text for text in system if isinstance(text, str)))


def _checked(turns: Any, where: str) -> Conversation:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise CommandError(f"{where}: no text of a user in it: each must be a string that is not empty")
    return Conversation(tuple(turns))
