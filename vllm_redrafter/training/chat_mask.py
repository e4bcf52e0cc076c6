"""A conversation as tokens, with the ones that the assistant wrote marked.

The chat template itself says which characters are the assistant's (`{% generation %}` ... `{% endgeneration %}`), and
the tokenizer says which characters each token stands for. Nothing is tokenised in parts, and no tag is searched for, so
neither a tokenizer that merges across turns nor a user who writes the assistant's tag moves the mask. The mask that
transformers makes itself is not used: it asks for the token of a span's last character, and where there is none (a
dropped space) or there are several (an emoji in bytes), it marks the rest of the conversation or loses tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from vllm_redrafter.training.messages import Message, UnusableRecord

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REMEDY = (
    "pass --chat_template FILE, a copy of the target's template with {% generation %} before what the assistant says "
    "and {% endgeneration %} after its closing token"
)


class MarkedTokens(NamedTuple):
    """Tokens of a text, and which of them stand for marked characters."""

    token_ids: torch.Tensor  # [length] int64
    is_marked: torch.Tensor  # [length] bool


class ChatEncoder:
    """Turns conversations into tokens with one template.

    Args:
        chat_template: text of a Jinja template; the tokenizer's own by default.

    Raises:
        ValueError: there is no template, it has no generation spans, or the tokenizer does not say where a token lies.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        check_offsets(tokenizer)
        if chat_template is not None and "{" not in chat_template:
            raise ValueError(f"chat_template {chat_template!r} is no Jinja template: pass its text, not where it lies")
        if chat_template is None and not tokenizer.chat_template:
            raise ValueError(f"the tokenizer has no chat template, but the data holds conversations: {_REMEDY}")
        self._template: str = tokenizer.get_chat_template(chat_template)
        if not _GENERATION.search(self._template):
            raise ValueError(f"the chat template does not mark what the assistant says: {_REMEDY}")
        self._tokenizer = tokenizer
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        special = {token_id for token_id, token in added.items() if token.special}
        # a token that begins a text closes none, unless it does both
        self._closing = torch.tensor(sorted(special - {tokenizer.bos_token_id} | {tokenizer.eos_token_id} - {None}))

    def encode(self, messages: Sequence[Message]) -> MarkedTokens:
        """Return the tokens of a conversation; marked are the assistant's, with the token that closes each answer.

        Raises:
            UnusableRecord: the template refuses the conversation or marks nothing in it.
        """
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise UnusableRecord(f"the chat template refuses it ({error.message})") from None
        encoded = encode_marked(self._tokenizer, texts[0], spans[0], add_special_tokens=False)
        if not encoded.is_marked.any():
            raise UnusableRecord("the chat template marks nothing in it")
        return encoded._replace(is_marked=self._with_closing_tokens(encoded))

    def _with_closing_tokens(self, encoded: MarkedTokens) -> torch.Tensor:
        """Mark the special token right after each answer too: some templates leave it outside of the span."""
        is_closing = torch.isin(encoded.token_ids, self._closing)
        follows = torch.cat((torch.zeros(1, dtype=torch.bool), encoded.is_marked[:-1]))
        ends_already = torch.cat((torch.zeros(1, dtype=torch.bool), (encoded.is_marked & is_closing)[:-1]))
        return encoded.is_marked | (follows & ~ends_already & is_closing)


def encode_marked(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Sequence[int]], *, add_special_tokens: bool
) -> MarkedTokens:
    """Return a text's tokens; marked is each that stands for a character of one of the `spans` [start, end)."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    offsets = torch.tensor(encoded["offset_mapping"], dtype=torch.int64).view(-1, 2)
    starts, ends = offsets.unbind(dim=1)  # [length]
    # some tokenizers trim white space off the offsets: a token of nothing else lies between its neighbours
    previous_ends = torch.cat((ends.new_zeros(1), ends[:-1].cummax(dim=0).values)) if len(ends) else ends
    starts = torch.where(starts == ends, torch.minimum(starts, previous_ends), starts)
    is_marked = torch.zeros(len(ends), dtype=torch.bool)
    for start, end in spans:
        is_marked |= (starts < end) & (ends > start)
    return MarkedTokens(torch.tensor(encoded["input_ids"], dtype=torch.int64), is_marked)


def check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not say which characters a token stands for.

    Raises:
        ValueError: naming its class.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for: "
            "load the fast tokenizer of this model"
        )
