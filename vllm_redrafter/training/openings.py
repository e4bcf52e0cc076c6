"""Prompts where there are none: the beginnings of texts that people wrote, from which a target goes on by itself.

A base model has no users to learn questions from. Cut after another number of tokens, the same text becomes another
prompt and the target's answer another text: what is short is texts that are not alike, not texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

_HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def cut_openings(texts: Sequence[str], lengths: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the first tokens of every text, each opening once: all texts at the first length, then at the next.

    Args:
        lengths: numbers of tokens, special ones not counted; a text that has no more than that is left out.
    """
    token_ids = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]
    seen: set[str] = set()
    for length in lengths:
        for ids in token_ids:
            if len(ids) <= length:
                continue
            # a character may be several tokens
            opening = str(tokenizer.decode(ids[:length])).rstrip(_HALF_A_CHARACTER)
            if opening.strip() and opening not in seen:
                seen.add(opening)
                yield opening
