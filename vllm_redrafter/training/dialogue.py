"""A conversation that a target answers turn by turn, kept as the tokens that it read and wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm_redrafter.training.messages import Message

Encode = Callable[[Sequence[Message]], list[int]]
"""Tokens of the prompt that a conversation makes, as the target is given them in serving."""


class Dialogue:
    """What a user says, with the answers so far.

    Args:
        index: which one it is in the file of prompts.
        turns: what the user says; each is said after the answer to the one before.
        system: stands before the first turn, where there is something.
        source: what an evaluation groups it under.
    """

    def __init__(self, index: int, turns: Sequence[str], *, system: str = "", source: str = "") -> None:
        self.index = index
        self.turns = tuple(turns)
        self.system = system
        self.source = source
        self.num_answered = 0
        self.num_tokens = 0
        self._messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._sequences: list[dict[str, Any]] = []

    @property
    def is_complete(self) -> bool:
        """Whether every turn has its answer."""
        return self.num_answered == len(self.turns)

    def next_prompt(self, encode: Encode) -> list[int]:
        """Return the tokens that the target answers next."""
        return encode([*self._messages, {"role": "user", "content": self.turns[self.num_answered]}])

    def take(self, prompt_ids: Sequence[int], token_ids: Sequence[int], text: str) -> None:
        """Append the answer to the next turn: the tokens that the target read, those that it wrote, and their text."""
        self._messages.append({"role": "user", "content": self.turns[self.num_answered]})
        self._messages.append({"role": "assistant", "content": text})
        self.num_answered += 1
        self.num_tokens += len(token_ids)
        read = list(prompt_ids)
        # a template may write an earlier answer down otherwise than the target did: then a new sequence begins
        earlier: list[int] = self._sequences[-1]["token_ids"] if self._sequences else []
        if not earlier or read[: len(earlier)] != earlier:
            self._sequences.append({"token_ids": [], "target_spans": []})
        sequence = self._sequences[-1]
        sequence["token_ids"] = [*read, *token_ids]
        sequence["target_spans"].append([len(read), len(read) + len(token_ids)])
        sequence["messages"] = list(self._messages)

    def records(self) -> list[dict[str, Any]]:
        """Return what training data holds of it: every token as it was read or written, the written ones as spans.

        One record holds all answers where each prompt goes on from the one before; `messages` is there for people.
        """
        return [
            {"index": self.index, "source": self.source, "messages": sequence["messages"], **sequence}
            for sequence in self._sequences
        ]
