from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.training.tokenizers import VICUNA_TEMPLATE, character_tokenizer
from vllm_redrafter.training.corpus import Corpus, describe, load_corpus
from vllm_redrafter.training.documents import Document

TOKENIZER = character_tokenizer()
SHARE_GPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}


def write(tmp_path: Path, name: str, content: Any) -> Path:
    path = tmp_path / name
    if path.suffix == ".jsonl":
        content = "\n".join(json.dumps(record) for record in content)
    elif path.suffix == ".json":
        content = json.dumps(content)
    path.write_text(content, encoding="utf-8")
    return path


def load(*data: str | Path, max_length: int = 200, **options: Any) -> Corpus:
    return load_corpus(data, TOKENIZER, max_length=max_length, chat_template=VICUNA_TEMPLATE, **options)


def texts(corpus: Corpus) -> list[str]:
    return [TOKENIZER.decode(document.token_ids) for document in corpus.documents]


def targets(document: Document, tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> str:
    return tokenizer.decode(document.token_ids[document.is_target])


def test_files_of_every_shape_are_read_in_their_order(tmp_path: Path) -> None:
    messages = {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}], "source": "own"}
    share_gpt = write(tmp_path, "chats.json", [SHARE_GPT, {**SHARE_GPT, "category": "greeting"}])
    lines = write(tmp_path, "lines.jsonl", [messages, {"prompt": "C", "response": "D"}, {"text": "E"}])
    plain = write(tmp_path, "plain.txt", "F\n\nG\n")

    corpus = load(share_gpt, str(lines), plain)

    assert [targets(document) for document in corpus.documents] == [
        " Ho</s>",
        " Ho</s>",
        " B</s>",
        " D</s>",
        "<s>E</s>",
        "<s>F\n\nG</s>",
    ]
    assert [document.source for document in corpus.documents] == ["chats", "greeting", "own", "lines", "lines", "plain"]
    assert corpus.dropped == {}


@pytest.mark.parametrize(
    ("text", "separator", "documents"),
    [
        ("one\n\nstill one\n", None, ["one\n\nstill one"]),
        ("one\n<|endoftext|>\n\ntwo<|endoftext|>three\n<|endoftext|>\n", None, ["one", "two", "three"]),
        ("one\n\ntwo\n\n\n  three\n", "\n\n", ["one", "two", "  three"]),
        ("one\ntwo<|endoftext|>", "\n", ["one", "two<|endoftext|>"]),
    ],
)
def test_a_text_file_is_split_where_a_separator_stands(
    text: str, separator: str | None, documents: list[str], tmp_path: Path
) -> None:
    corpus = load(write(tmp_path, "a.txt", text), text_separator=separator)

    assert texts(corpus) == [f"<s>{document}</s>" for document in documents]


def test_a_long_text_goes_on_in_documents_of_equal_length(tmp_path: Path) -> None:
    text = "abcdefghijklmnopq"

    corpus = load(write(tmp_path, "a.txt", text), max_length=8)

    # 17 characters and the end, each part behind its own beginning
    assert texts(corpus) == ["<s>abcdef", "<s>ghijkl", "<s>mnopq</s>"]
    assert all(document.is_target.all() for document in corpus.documents)
    assert corpus.dropped == {}


def test_a_conversation_is_cut_at_every_boundary_without_moving_its_mask(tmp_path: Path) -> None:
    turns = [("human", "ab"), ("gpt", "cd"), ("human", "ef"), ("gpt", "gh")]
    path = write(tmp_path, "a.jsonl", [{"conversations": [{"from": who, "value": text} for who, text in turns]}])
    (whole,) = load(path).documents
    length, first = len(whole.token_ids), int(whole.is_target.nonzero()[0])
    assert targets(whole) == " cd</s> gh</s>"

    for max_length in range(first + 1, length):
        corpus = load(path, max_length=max_length)

        (cut,) = corpus.documents
        assert torch.equal(cut.token_ids, whole.token_ids[:max_length])
        assert torch.equal(cut.is_target, whole.is_target[:max_length])
        assert corpus.dropped == {"truncated": 1}
    assert load(path, max_length=length).dropped == {}
    with pytest.raises(ValueError, match=rf"nothing to learn from \(1 × no answer within {first} tokens\)"):
        load(path, max_length=first)


def test_records_without_use_are_counted_by_reason(tmp_path: Path) -> None:
    def share_gpt(*turns: tuple[str, Any]) -> dict[str, Any]:
        return {"conversations": [{"from": who, "value": value} for who, value in turns]}

    records = [
        SHARE_GPT,
        share_gpt(("human", "nobody answers")),
        share_gpt(("gpt", "nobody asks")),
        share_gpt(),
        share_gpt(("human", "Hi"), ("gpt", "  ")),
        share_gpt(("human", "Hi"), ("gpt", None)),
        share_gpt(("human", "Hi"), ("bard", "Ho")),
        share_gpt(("human", "Hi"), ("gpt", 7)),
        share_gpt(("tool", "Hi"), ("human", "Hi"), ("gpt", "Ho")),
        {"prompt": "Hi", "response": None},
        {"text": " \n"},
        {"question": "Hi"},
        "Hi",
    ]

    corpus = load(write(tmp_path, "a.jsonl", records))

    assert len(corpus.documents) == 1
    assert corpus.dropped == {
        "no assistant turn after a user's": 3,
        "a turn without text": 2,
        "unknown role 'bard'": 1,
        "a turn holds something other than text": 1,
        "the chat template refuses it (no such role here)": 1,
        "no response": 1,
        "empty text": 1,
        "no messages, conversations, text, or prompt with response": 1,
        "a str, not an object": 1,
    }
    assert describe(corpus.dropped).startswith("3 × no assistant turn after a user's, 2 × a turn without text, 1 ×")


@pytest.mark.parametrize("shape", ["saved", "dictionary", "parquet"])
def test_a_data_set_is_read_by_its_directory_and_split(shape: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([SHARE_GPT, SHARE_GPT])
    directory = tmp_path / "greetings"
    directory.mkdir()
    split = "" if shape == "saved" else ":test"
    if shape == "saved":
        rows.save_to_disk(directory)
    elif shape == "dictionary":
        datasets.DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(directory)
    else:
        rows.to_parquet(directory / "test-0.parquet")

    corpus = load(f"{directory}{split}")

    assert [targets(document) for document in corpus.documents] == [" Ho</s>", " Ho</s>"]
    assert [document.source for document in corpus.documents] == ["greetings", "greetings"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", {"text": "a"}, r"a.json holds no list: name it .jsonl"),
        ("a.jsonl", [], r"a.jsonl is empty"),
        ("a.txt", " \n", r"a.txt is empty: put at least one document into it"),
        ("a.csv", "a,b", r"a.csv is neither .json, .jsonl nor .txt: convert or unpack it first"),
        ("a.txt", "<|endoftext|>", r"a.txt holds nothing to learn from \(no record\): pass other data"),
        ("a.jsonl", [{"text": ""}, "x", {"text": " "}], r"learn from \(2 × empty text, 1 × a str, not an object\)"),
    ],
)
def test_a_file_that_nothing_can_be_learnt_from_is_refused(
    name: str, content: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, name, content))


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "line\\u2028separator \u2028 inside"}\n\n{"text": b}\n', encoding="utf-8")

    with pytest.raises(ValueError, match=r"a.jsonl, line 3: no JSON \(Expecting value, column 10\): mend it"):
        load(path)


def test_data_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    with pytest.raises(ValueError, match=r"no file 'missing.jsonl': pass a data file"):
        load("missing.jsonl")
    with pytest.raises(ValueError, match=r"no file and no data set 'nobody/nothing' with a split 'test' \(.*check the"):
        load("nobody/nothing:test")


def test_a_length_that_holds_no_two_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length is 1, but a document needs at least 2 tokens"):
        load(max_length=1)
