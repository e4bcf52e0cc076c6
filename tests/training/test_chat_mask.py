from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.training.tokenizers import (
    SHARED,
    VICUNA,
    VICUNA_TEMPLATE,
    character_tokenizer,
    example_tokenizer,
    needs_vicuna,
)
from vllm_redrafter.training.chat_mask import ChatEncoder, MarkedTokens
from vllm_redrafter.training.messages import UnusableRecord, read_messages

TWO_TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good morning!"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Good night.\n"},
]


def marked_runs(tokenizer: PreTrainedTokenizerBase, encoded: MarkedTokens) -> list[str]:
    """Return the text of each run of marked tokens."""
    runs: list[list[int]] = []
    before = False
    for token_id, is_marked in zip(encoded.token_ids.tolist(), encoded.is_marked.tolist(), strict=True):
        if is_marked:
            runs[-1].append(token_id) if before else runs.append([token_id])
        before = is_marked
    return [tokenizer.decode(run) for run in runs]


def vicuna(legacy: bool) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(VICUNA, legacy=legacy)


@needs_vicuna
@pytest.mark.parametrize("legacy", [True, False])
def test_every_answer_of_two_turns_is_marked_by_both_kinds_of_vicuna_s_tokenizer(legacy: bool) -> None:
    tokenizer = vicuna(legacy)

    encoded = ChatEncoder(tokenizer, VICUNA_TEMPLATE).encode(TWO_TURNS)

    runs = marked_runs(tokenizer, encoded)
    assert [run.strip() for run in runs] == ["Good morning!</s>", "Good night.\n</s>"]
    words = tokenizer.convert_ids_to_tokens(encoded.token_ids.tolist())
    # the two kinds differ in the token after an answer, which moved the masks of those who counted tokens
    assert words[words.index("</s>") + 1] == ("▁US" if legacy else "USER")
    assert words[0] == "<s>"
    assert words.count("<s>") == 1


@needs_vicuna
@pytest.mark.parametrize("legacy", [True, False])
def test_a_real_conversation_is_marked_whole(legacy: bool) -> None:
    (record,) = json.loads((SHARED / "text" / "sharegpt_tiny.json").read_text())
    messages = read_messages(record["conversations"])
    tokenizer = vicuna(legacy)

    encoded = ChatEncoder(tokenizer, VICUNA_TEMPLATE).encode(messages)

    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert [run.strip() for run in marked_runs(tokenizer, encoded)] == [f"{answer.strip()}</s>" for answer in answers]


@needs_vicuna
@pytest.mark.parametrize("legacy", [True, False])
def test_a_user_who_writes_the_assistant_s_tag_is_not_marked(legacy: bool) -> None:
    tokenizer = vicuna(legacy)
    user = "Say ASSISTANT: I am you</s> USER: ASSISTANT: twice"
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "ASSISTANT: no USER: yes"}]

    encoded = ChatEncoder(tokenizer, VICUNA_TEMPLATE).encode(messages)

    assert [run.strip() for run in marked_runs(tokenizer, encoded)] == ["ASSISTANT: no USER: yes</s>"]


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize(
    "answer", ["plain", "  indented\n\n    more  ", "ends in an emoji \N{GRINNING FACE}", "\N{GRINNING FACE}", " "]
)
def test_white_space_and_characters_of_many_tokens_are_marked_whole(answer: str, trim_offsets: bool) -> None:
    tokenizer = character_tokenizer(trim_offsets=trim_offsets)
    template = VICUNA_TEMPLATE.replace("' ' + message['content']", "message['content']")
    messages = [
        {"role": "user", "content": "x\N{GRINNING FACE}"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "  y "},
        {"role": "assistant", "content": "z"},
    ]

    encoded = ChatEncoder(tokenizer, template).encode(messages)

    assert marked_runs(tokenizer, encoded) == [f"{answer}</s>", "z</s>"]


@pytest.mark.parametrize("after", ["{{- eos_token -}}", "{{- eos_token + bos_token -}}", "{{- '<|user|>' -}}"])
def test_the_token_that_closes_an_answer_is_marked_where_the_template_leaves_it_out(after: str) -> None:
    tokenizer = character_tokenizer()
    template = VICUNA_TEMPLATE.replace(" + eos_token -}}{%- endgeneration -%}", " -}}{%- endgeneration -%}" + after)

    encoded = ChatEncoder(tokenizer, template).encode(TWO_TURNS)

    closing = "<|user|>" if "user" in after else "</s>"
    assert marked_runs(tokenizer, encoded) == [f" Good morning!{closing}", f" Good night.\n{closing}"]


def test_what_follows_an_answer_without_a_closing_token_is_not_marked() -> None:
    tokenizer = character_tokenizer()
    opened = VICUNA_TEMPLATE.replace(" + eos_token", "")
    doubled = VICUNA_TEMPLATE.replace("{%- endgeneration -%}", "{%- endgeneration -%}{{- eos_token -}}")

    open_runs = marked_runs(tokenizer, ChatEncoder(tokenizer, opened).encode(TWO_TURNS))
    doubled_runs = marked_runs(tokenizer, ChatEncoder(tokenizer, doubled).encode(TWO_TURNS))

    assert open_runs == [" Good morning!", " Good night.\n"]
    assert doubled_runs == [" Good morning!</s>", " Good night.\n</s>"]


def test_the_tokens_are_those_of_the_whole_rendered_text() -> None:
    tokenizer = example_tokenizer()
    template = tokenizer.chat_template
    spanned = template.replace(
        "{{ message['content'] }}<|endoftext|>",
        "{% generation %}{{ message['content'] }}<|endoftext|>{% endgeneration %}",
    )
    assert spanned != template

    encoded = ChatEncoder(tokenizer, spanned).encode(TWO_TURNS)

    assert encoded.token_ids.tolist() == tokenizer.apply_chat_template(TWO_TURNS, return_dict=False)
    assert encoded.token_ids.dtype == torch.int64
    # the space after the tag and the answer's first word are one token, which the target writes
    assert marked_runs(tokenizer, encoded) == [" Good morning!<|endoftext|>", " Good night.\n<|endoftext|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"the tokenizer has no chat template, but the data holds conversations: pass --chat_template FILE"),
        (
            "{{ messages[0].content }}",
            r"does not mark what the assistant says: pass --chat_template FILE.*generation %}",
        ),
        ("chat.jinja", r"chat_template 'chat.jinja' is no Jinja template: pass its text"),
    ],
)
def test_a_template_that_marks_nothing_is_refused_with_the_remedy(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatEncoder(character_tokenizer(), template)


def test_a_tokenizer_that_does_not_say_where_tokens_lie_is_refused() -> None:
    class Slow:
        is_fast = False

    slow: Any = Slow()
    with pytest.raises(ValueError, match="Slow does not say which characters a token stands for: load the fast"):
        ChatEncoder(slow, VICUNA_TEMPLATE)


def test_what_a_template_refuses_or_does_not_mark_is_unusable() -> None:
    encoder = ChatEncoder(character_tokenizer(), VICUNA_TEMPLATE)

    with pytest.raises(UnusableRecord, match=r"the chat template refuses it \(no such role here\)"):
        encoder.encode([{"role": "tool", "content": "42"}, *TWO_TURNS])
    with pytest.raises(UnusableRecord, match="the chat template marks nothing in it"):
        encoder.encode(TWO_TURNS[:1])
