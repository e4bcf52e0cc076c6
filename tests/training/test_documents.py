from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.training.tokenizers import VICUNA_TEMPLATE, character_tokenizer, example_tokenizer
from vllm_redrafter.training.documents import Document, DocumentMaker
from vllm_redrafter.training.messages import UnusableRecord, read_messages


def said(tokenizer: PreTrainedTokenizerBase, document: Document) -> tuple[str, str]:
    """Return the text of a document and of its targets."""
    token_ids = document.token_ids
    return tokenizer.decode(token_ids), tokenizer.decode(token_ids[document.is_target])


def test_an_answer_without_a_chat_template_continues_its_prompt_and_ends() -> None:
    tokenizer = character_tokenizer()

    document = DocumentMaker(tokenizer).make({"prompt": "1 + 1 =", "response": " 2"}, "sums")

    assert said(tokenizer, document) == ("<s>1 + 1 = 2</s>", " 2</s>")
    assert document.source == "sums"


def test_an_answer_with_a_chat_template_is_a_conversation() -> None:
    tokenizer = character_tokenizer()

    document = DocumentMaker(tokenizer, VICUNA_TEMPLATE).make({"prompt": "1 + 1 =", "response": "2"}, "sums")

    assert said(tokenizer, document)[0].endswith(" USER: 1 + 1 = ASSISTANT: 2</s>")
    assert said(tokenizer, document)[1] == " 2</s>"


def test_a_text_begins_and_ends_as_the_tokenizer_says() -> None:
    with_start, without_start = character_tokenizer(), character_tokenizer(adds_bos=False)
    example = example_tokenizer()

    assert said(with_start, DocumentMaker(with_start).make({"text": "ab"}, "")) == ("<s>ab</s>", "<s>ab</s>")
    assert said(without_start, DocumentMaker(without_start).make({"text": "ab"}, ""))[0] == "ab</s>"
    # an end that is there already is not doubled
    assert said(without_start, DocumentMaker(without_start).make({"text": "ab</s>"}, ""))[0] == "ab</s>"
    assert said(example, DocumentMaker(example).make({"text": "ab"}, ""))[0] == "ab<|endoftext|>"


def test_what_was_distilled_is_taken_token_by_token() -> None:
    record = {
        "token_ids": [5, 6, 7, 8, 9],
        "target_spans": [[1, 3], [4, 5]],
        "messages": [{"role": "user", "content": "for people"}],
        "category": "math",
    }

    document = DocumentMaker(character_tokenizer()).make(record, "file")

    assert torch.equal(document.token_ids, torch.tensor([5, 6, 7, 8, 9]))
    assert document.is_target.tolist() == [False, True, True, False, True]
    assert document.source == "math"


@pytest.mark.parametrize(
    "change",
    [
        {"target_spans": []},
        {"target_spans": [[1, 6]]},
        {"target_spans": [[2, 2]]},
        {"target_spans": [[-1, 2]]},
        {"target_spans": [1, 2]},
        {"target_spans": None},
        {"token_ids": [[5, 6]]},
        {"token_ids": "5 6"},
        {"token_ids": []},
    ],
)
def test_a_distilled_record_that_is_spoilt_is_unusable(change: dict[str, Any]) -> None:
    record = {"token_ids": [5, 6, 7, 8, 9], "target_spans": [[1, 3]], **change}

    with pytest.raises(UnusableRecord, match="malformed token_ids or target_spans"):
        DocumentMaker(character_tokenizer()).make(record, "")


@pytest.mark.parametrize("token_id", [-1, 259])
def test_tokens_of_another_tokenizer_are_refused(token_id: int) -> None:
    tokenizer = character_tokenizer()
    assert len(tokenizer) == 259

    with pytest.raises(
        ValueError, match=r"the data holds token -?\d+, but the tokenizer has 259: use data that was dis"
    ):
        DocumentMaker(tokenizer).make({"token_ids": [5, token_id], "target_spans": [[0, 2]]}, "")


def test_turns_of_both_shapes_become_messages_from_the_first_question_to_the_last_answer() -> None:
    share_gpt = [
        ("system", "be kind"),
        ("gpt", "the end of something"),
        ("human", "one"),
        ("chatgpt", "two"),
        ("human", "three"),
    ]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    openai = [
        {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]},
        call,
        {"role": "tool", "content": "2", "tool_call_id": "a"},
        {"role": "assistant", "content": "Two."},
    ]

    assert read_messages([{"from": who, "value": text} for who, text in share_gpt]) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
    ]
    assert read_messages(openai) == [{"role": "user", "content": "1 + 1?"}, {**call, "content": ""}, *openai[2:]]


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "cat.png"}}, {"text": 3}, 3])
def test_a_picture_is_no_text(part: Any) -> None:
    turns = [{"role": "user", "content": [{"text": "What is it?"}, part]}, {"role": "assistant", "content": "A cat."}]

    with pytest.raises(UnusableRecord, match="a turn holds something other than text"):
        read_messages(turns)
