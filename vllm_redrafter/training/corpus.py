"""A corpus: the documents of all data files, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from vllm_redrafter.training.documents import Document, DocumentMaker
from vllm_redrafter.training.messages import UnusableRecord
from vllm_redrafter.training.records import read_records, source_name

TRUNCATED = "truncated"


class Corpus(NamedTuple):
    """What a drafter is trained on or measured with."""

    documents: list[Document]
    dropped: Counter[str]
    """Number of records by the reason why they are not here; `truncated` counts documents that are, but cut short."""


def load_corpus(
    data: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template: str | None = None,
    text_separator: str | None = None,
) -> Corpus:
    """Return the documents of files and data sets in their order, each of at most `max_length` tokens.

    A conversation or an answer that is longer is cut at its end. A plain text that is longer goes on in further
    documents, which begin as any text does.

    Args:
        data: files or data sets, as `records.read_records` takes them.
        tokenizer: the target's.
        chat_template: text of a Jinja template with generation spans; the tokenizer's own by default.
        text_separator: what stands between the documents of a text file; `<|endoftext|>` by default.

    Raises:
        ValueError: a source cannot be read or holds nothing usable, or tokenizer and template do not fit the data.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, but a document needs at least 2 tokens")
    maker = DocumentMaker(tokenizer, chat_template)
    corpus = Corpus([], Counter())
    for source in data:
        found = _load(source, maker, max_length, text_separator)
        if not found.documents:
            raise ValueError(f"{source} holds nothing to learn from ({describe(found.dropped)}): pass other data")
        corpus.documents.extend(found.documents)
        corpus.dropped.update(found.dropped)
    return corpus


def describe(dropped: Counter[str]) -> str:
    """Return the numbers with their reasons as one line, the largest first."""
    return ", ".join(f"{number} × {reason}" for reason, number in dropped.most_common()) or "no record"


def _load(source: str | Path, maker: DocumentMaker, max_length: int, text_separator: str | None) -> Corpus:
    found = Corpus([], Counter())
    name = source_name(source)
    for record in read_records(source, text_separator):
        try:
            document = maker.make(record, name)
        except UnusableRecord as reason:
            found.dropped[str(reason)] += 1
            continue
        fitting = maker.fit(document, max_length)
        found.documents.extend(fitting)
        if not fitting:
            found.dropped[f"no answer within {max_length} tokens"] += 1
        elif len(fitting) == 1 and len(fitting[0].token_ids) < len(document.token_ids):
            found.dropped[TRUNCATED] += 1
    return found
