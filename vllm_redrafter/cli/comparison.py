"""Comparing answers with and without the drafter, up to their first difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vllm_redrafter.cli.generation import Answer


class Difference(NamedTuple):
    """Where two answers to the same prompt part."""

    prompt_index: int
    position: int
    """Index of the token in the answer."""
    kind: str
    """ "token", "logprob" or "error"."""
    expected: float | str | None
    """Without the drafter: token id (None where the answer has ended), log-probability or error."""
    found: float | str | None
    """The same with the drafter."""


def first_difference(
    expected: Sequence[Answer], found: Sequence[Answer], logprob_tolerance: float | None = None
) -> Difference | None:
    """Return the first difference between answers to the same prompts, or None.

    Args:
        expected: answers without the drafter.
        found: answers with it.
        logprob_tolerance: compare log-probabilities too, up to this.
    """
    for index, (left, right) in enumerate(zip(expected, found, strict=True)):
        if left.error != right.error:
            return Difference(index, 0, "error", left.error, right.error)
        for position in range(max(len(left.token_ids), len(right.token_ids))):
            left_id, right_id = _at(left.token_ids, position), _at(right.token_ids, position)
            if left_id != right_id:
                return Difference(index, position, "token", left_id, right_id)
        if logprob_tolerance is not None:
            difference = _first_logprob_difference(index, left, right, logprob_tolerance)
            if difference is not None:
                return difference
    return None


def _at(token_ids: Sequence[int], position: int) -> int | None:
    return token_ids[position] if position < len(token_ids) else None


def _first_logprob_difference(index: int, left: Answer, right: Answer, tolerance: float) -> Difference | None:
    for position, (expected, found) in enumerate(zip(left.logprobs or [], right.logprobs or [], strict=True)):
        if len(expected) != len(found):
            return Difference(index, position, "logprob", len(expected), len(found))
        for token_id, value in expected.items():
            # a token that is not among the other's best must be level with the last of those
            other = found.get(token_id, min(found.values()))
            # infinities are equal to themselves, and differ from everything else by more than any tolerance
            if value != other and not abs(value - other) <= tolerance:
                return Difference(index, position, "logprob", value, other)
    return None
