"""What was said in a record, in the roles and keys that chat templates know."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class UnusableRecord(Exception):
    """Nothing can be learnt from a record; the message is the reason under which it is counted."""


def read_messages(turns: Any) -> list[Message]:
    """Return the turns of a ShareGPT or OpenAI conversation that a model can learn from, as chat templates take them.

    What an assistant says before anybody asks (the cut beginning of a longer conversation) and what follows the last
    answer are left out.

    Raises:
        UnusableRecord: no assistant speaks, a role is unknown or a turn has no text.
    """
    if not isinstance(turns, list):
        raise UnusableRecord("its turns are no list")
    messages = [_read_turn(turn) for turn in turns]
    opening = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    messages = [message for message in messages[:opening] if message["role"] != "assistant"] + messages[opening:]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise UnusableRecord("no assistant turn after a user's")
    return messages


def _read_turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise UnusableRecord("a turn is no object")
    said_by = turn.get("role", turn.get("from"))
    role = _ROLES.get(said_by) if isinstance(said_by, str) else None
    if role is None:
        raise UnusableRecord(f"unknown role {said_by!r}")
    # tool calls and what else a template may ask for stay as they are
    rest = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    content = _read_content(turn.get("content", turn.get("value")))
    if not content.strip() and not rest.get("tool_calls"):
        raise UnusableRecord("a turn without text")
    return {**rest, "role": role, "content": content}


def _read_content(content: Any) -> str:
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if any(text is not None and not isinstance(text, str) for text in texts):
        raise UnusableRecord("a turn holds something other than text")
    return "".join(text for text in texts if text is not None)
