from __future__ import annotations

from tests.training.tokenizers import character_tokenizer
from vllm_redrafter.training.openings import cut_openings


def openings(texts: list[str], *lengths: int) -> list[str]:
    return list(cut_openings(texts, lengths, character_tokenizer()))


def test_every_text_is_cut_at_every_length_where_something_is_left_to_say() -> None:
    assert openings(["abcdef", "xyz", "12"], 2, 4) == ["ab", "xy", "abcd"]


def test_openings_that_are_alike_are_asked_once() -> None:
    assert openings(["once upon", "once more", "on"], 5, 6) == ["once ", "once u", "once m"]


def test_a_character_is_not_cut_in_the_middle() -> None:
    # a token per byte; é has two
    assert openings(["caféteria"], 4, 5) == ["caf", "café"]


def test_an_opening_says_something() -> None:
    assert openings(["   abc", "é"], 1, 2, 4) == ["   a"]
