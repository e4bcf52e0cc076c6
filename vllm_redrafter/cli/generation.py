"""What goes to an engine and what comes back, as plain data that JSON can carry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Prompt(NamedTuple):
    """Something to answer: a text to continue, a conversation that ends with the user's words, or the tokens of one."""

    text: str | None = None
    messages: tuple[dict[str, str], ...] = ()
    token_ids: tuple[int, ...] = ()
    seed: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {name: value for name, value in self._asdict().items() if value not in (None, ())}


class Answer(NamedTuple):
    """What one prompt got."""

    text: str
    token_ids: list[int]
    num_steps: int
    """Decode steps: the step that reads the prompt, which emits one token, is not counted."""
    seconds: float
    """From the prompt's arrival at the engine to its last token."""
    error: str | None = None
    """Why there is no answer."""
    logprobs: list[dict[str, float]] | None = None
    """Per token: log-probability by token id, where asked for."""

    @property
    def tokens_per_step(self) -> float | None:
        """Mean number of tokens that a decode step emitted, or None without decode steps."""
        return tokens_per_step([self])


class Generation(NamedTuple):
    """Answers in the order of their prompts, with what producing them took."""

    answers: list[Answer]
    seconds: float
    stats: dict[str, float]
    """The drafter's counters during this generation; empty without a drafter."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(answer.token_ids) for answer in self.answers)


def tokens_per_step(answers: Iterable[Answer]) -> float | None:
    """Return the mean acceptance length over decode steps (1.0 without a drafter), or None without decode steps."""
    decoded = [answer for answer in answers if answer.num_steps]
    steps = sum(answer.num_steps for answer in decoded)
    return sum(len(answer.token_ids) - 1 for answer in decoded) / steps if steps else None


def merge(generations: Iterable[Generation]) -> Generation:
    """Return one generation that holds several that ran one after another."""
    answers: list[Answer] = []
    seconds = 0.0
    stats: dict[str, float] = {}
    for generation in generations:
        answers += generation.answers
        seconds += generation.seconds
        for name, value in generation.stats.items():
            stats[name] = stats.get(name, 0) + value
    return Generation(answers, seconds, stats)


def join(messages: Sequence[dict[str, str]]) -> str:
    """Return a conversation as plain text: what the model said continues its prompt, a new turn begins a line."""
    text = ""
    for message in messages:
        text += "\n" * bool(text and message["role"] == "user") + message["content"]
    return text
