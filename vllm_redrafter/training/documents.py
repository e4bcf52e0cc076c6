"""Documents: token sequences that a drafter is trained on, and the records that they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from vllm_redrafter.training.chat_mask import ChatEncoder, check_offsets, encode_marked
from vllm_redrafter.training.messages import UnusableRecord, read_messages


class Document(NamedTuple):
    """Tokens that belong together, as the target would see them in serving."""

    token_ids: torch.Tensor  # [length] int64
    is_target: torch.Tensor  # [length] bool: what the assistant or the target wrote, its closing token included
    source: str
    """Where it comes from: the record's own `source` or `category`, else the file. Evaluation groups by it."""


class DocumentMaker:
    """Makes documents of records.

    Args:
        chat_template: text of a Jinja template with generation spans; the tokenizer's own by default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._chat: ChatEncoder | None = None

    def make(self, record: Any, source: str) -> Document:
        """Return the document of a record, whatever its length.

        Raises:
            UnusableRecord: nothing can be learnt from the record.
            ValueError: nothing can be learnt from any such record with this tokenizer and template.
        """
        if not isinstance(record, Mapping):
            raise UnusableRecord(f"a {type(record).__name__}, not an object")
        own = record.get("source", record.get("category"))
        source = own if isinstance(own, str) and own else source
        # what `distill` wrote comes first: its conversation stands beside the tokens for people
        if "token_ids" in record:
            return self._distilled(record, source)
        for key in ("messages", "conversations"):
            if key in record:
                return self._chat_document(record[key], source)
        if "prompt" in record and "response" in record:
            return self._answer(record["prompt"], record["response"], source)
        if "text" in record:
            return self._text(record["text"], source)
        raise UnusableRecord("no messages, conversations, text, or prompt with response")

    def fit(self, document: Document, max_length: int) -> list[Document]:
        """Return a document in at most `max_length` tokens: cut short, or nothing if no target token is left of it.

        Where every token is a target none need be lost: such a text goes on in further documents of equal length,
        which begin with the same token if that is the one before every text.
        """
        length = len(document.token_ids)
        if length <= max_length:
            return [document]
        if not document.is_target.all():
            is_target = document.is_target[:max_length]
            cut = document._replace(token_ids=document.token_ids[:max_length], is_target=is_target)
            return [cut] if is_target.any() else []
        first = document.token_ids[:1]
        opening = first if int(first) == self._tokenizer.bos_token_id else first[:0]
        body = document.token_ids[len(opening) :]
        num_parts = -(-len(body) // (max_length - len(opening)))
        parts = [torch.cat((opening, part)) for part in body.tensor_split(num_parts)]
        return [document._replace(token_ids=part, is_target=torch.ones_like(part, dtype=torch.bool)) for part in parts]

    def _distilled(self, record: Mapping[str, Any], source: str) -> Document:
        try:
            token_ids = torch.tensor(record["token_ids"], dtype=torch.int64)
            spans = [(int(start), int(end)) for start, end in record["target_spans"]]
        except (KeyError, TypeError, ValueError):
            raise UnusableRecord("malformed token_ids or target_spans") from None
        if token_ids.ndim != 1 or any(not 0 <= start < end <= len(token_ids) for start, end in spans) or not spans:
            raise UnusableRecord("malformed token_ids or target_spans")
        largest, num_known = int(token_ids.max()), len(self._tokenizer)
        if largest >= num_known or int(token_ids.min()) < 0:
            raise ValueError(
                f"the data holds token {largest}, but the tokenizer has {num_known}: "
                "use data that was distilled from this target"
            )
        is_target = torch.zeros(len(token_ids), dtype=torch.bool)
        for start, end in spans:
            is_target[start:end] = True
        return Document(token_ids, is_target, source)

    def _chat_document(self, turns: Any, source: str) -> Document:
        messages = read_messages(turns)
        if self._chat is None:
            self._chat = ChatEncoder(self._tokenizer, self._chat_template)
        return Document(*self._chat.encode(messages), source)

    def _answer(self, prompt: Any, response: Any, source: str) -> Document:
        if not isinstance(prompt, str) or not isinstance(response, str) or not response.strip():
            raise UnusableRecord("no response")
        if self._chat_template is not None or self._tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return self._chat_document(turns, source)
        check_offsets(self._tokenizer)
        span = [len(prompt), len(prompt) + len(response)]
        encoded = encode_marked(self._tokenizer, prompt + response, [span], add_special_tokens=True)
        return self._with_end(Document(*encoded, source))

    def _text(self, text: Any, source: str) -> Document:
        if not isinstance(text, str) or not text.strip():
            raise UnusableRecord("empty text")
        token_ids = torch.tensor(self._tokenizer.encode(text, verbose=False), dtype=torch.int64)
        return self._with_end(Document(token_ids, torch.ones_like(token_ids, dtype=torch.bool), source))

    def _with_end(self, document: Document) -> Document:
        """Append the token with which a model ends a text, where the tokenizer has not done so."""
        end = self._tokenizer.eos_token_id
        if end is None or int(document.token_ids[-1]) == end:
            return document
        return document._replace(
            token_ids=torch.cat((document.token_ids, document.token_ids.new_tensor([end]))),
            is_target=torch.cat((document.is_target, document.is_target.new_ones(1))),
        )
