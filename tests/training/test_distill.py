from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from tests.training.tokenizers import character_tokenizer
from vllm_redrafter.training.corpus import load_corpus
from vllm_redrafter.training.dialogue import Dialogue
from vllm_redrafter.training.distillation import Ask, OnReply, Question, Reply, distill
from vllm_redrafter.training.distilled_file import DistilledFile

SETTINGS = {"target": "t", "temperature": 0.0}
ANSWERED, END = 30, 31


def encode(messages: Sequence[dict[str, Any]]) -> list[int]:
    """Return a token per word: its length, 31 after what an assistant said."""
    if messages[0]["content"] == "nonsense":
        raise TemplateError("no nonsense")
    token_ids = []
    for message in messages:
        token_ids += [len(word) for word in message["content"].split()]
        token_ids += [END] * (message["role"] == "assistant")
    return token_ids


def fake_target(text: str = "y" * ANSWERED, dies_after: int = 1000) -> Ask:
    """Return a target that answers everything with one word and the end, and nothing with more than six tokens."""
    num_replies = 0

    def ask(questions: Sequence[Question], on_reply: OnReply) -> None:
        nonlocal num_replies
        # the last one first: an engine answers as it likes
        for number, question in reversed(list(enumerate(questions))):
            if num_replies == dies_after:
                raise RuntimeError("killed")
            num_replies += 1
            if len(question.token_ids) > 6:
                on_reply(number, Reply([], "", "too long"))
            else:
                on_reply(number, Reply([ANSWERED, END], text))

    return ask


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def open_file(tmp_path: Path, **settings: Any) -> DistilledFile:
    return DistilledFile(tmp_path / "out.jsonl", {**SETTINGS, **settings})


def test_a_conversation_is_one_record_of_the_tokens_that_were_read_and_written(tmp_path: Path) -> None:
    dialogue = Dialogue(3, ["a bb", "ccc"], system="dddd", source="tests")

    with open_file(tmp_path) as output:
        distill([dialogue], encode, fake_target(), output)

    assert rows(tmp_path / "out.jsonl") == [
        {
            "index": 3,
            "source": "tests",
            "messages": [
                {"role": "system", "content": "dddd"},
                {"role": "user", "content": "a bb"},
                {"role": "assistant", "content": "y" * ANSWERED},
                {"role": "user", "content": "ccc"},
                {"role": "assistant", "content": "y" * ANSWERED},
            ],
            "token_ids": [4, 1, 2, ANSWERED, END, 3, ANSWERED, END],
            "target_spans": [[3, 5], [6, 8]],
            "made_by": SETTINGS,
        }
    ]
    assert (output.num_records, output.num_failed, output.num_tokens) == (1, 0, 4)
    assert rows(tmp_path / "out.failed.jsonl") == []


def test_where_the_template_writes_an_answer_otherwise_a_new_record_begins(tmp_path: Path) -> None:
    # the target wrote token 30, but its text is read as 5
    with open_file(tmp_path) as output:
        distill([Dialogue(0, ["a", "bb"])], encode, fake_target(text="seven"), output)

    first, second = rows(tmp_path / "out.jsonl")
    assert (first["token_ids"], first["target_spans"]) == ([1, ANSWERED, END], [[1, 3]])
    assert (second["token_ids"], second["target_spans"]) == ([1, 5, END, 2, ANSWERED, END], [[4, 6]])
    assert len(first["messages"]) == 2
    assert len(second["messages"]) == 4


def test_what_is_written_is_read_as_training_data_without_another_tokenisation(tmp_path: Path) -> None:
    with open_file(tmp_path) as output:
        distill([Dialogue(0, ["a bb", "ccc"], source="tests")], encode, fake_target(), output)

    corpus = load_corpus([output.path], character_tokenizer(), max_length=100)

    (document,) = corpus.documents
    assert document.token_ids.tolist() == [1, 2, ANSWERED, END, 3, ANSWERED, END]
    assert document.token_ids[document.is_target].tolist() == [ANSWERED, END] * 2
    assert document.is_target.tolist() == [False, False, True, True, False, True, True]
    assert document.source == "tests"


def test_what_cannot_be_answered_stands_beside_with_the_reason(tmp_path: Path) -> None:
    dialogues = [
        Dialogue(0, ["a"]),
        Dialogue(1, ["one two three four five six seven"]),
        Dialogue(2, ["one two", "three four five six", "never said"]),
        Dialogue(3, [" "]),
        Dialogue(4, ["nonsense"]),
    ]
    num_finished = 0

    def count() -> None:
        nonlocal num_finished
        num_finished += 1

    with open_file(tmp_path) as output:
        distill(dialogues, encode, fake_target(), output, on_finished=count)

    records, failed = rows(tmp_path / "out.jsonl"), rows(tmp_path / "out.failed.jsonl")
    assert [(row["index"], row["target_spans"]) for row in records] == [(0, [[1, 3]]), (2, [[2, 4]])]
    assert {row["index"]: (row["turn"], row["reason"]) for row in failed} == {
        1: (1, "too long"),
        2: (2, "too long"),
        3: (1, "the prompt is empty"),
        4: (1, "the chat template refuses it (no nonsense)"),
    }
    assert failed[-1]["turns"] == ["one two", "three four five six", "never said"]
    assert (output.num_records, output.num_failed, num_finished) == (2, 4, 5)


@pytest.mark.parametrize("dies_after", range(8))
@pytest.mark.parametrize("num_together", [1, 3])
def test_a_run_that_was_killed_goes_on_to_the_same_data(num_together: int, dies_after: int, tmp_path: Path) -> None:
    def make() -> list[Dialogue]:
        turns = [["a"], ["bb", "one two three four five six seven"], ["c", "d"], ["one two three four five six seven"]]
        return [Dialogue(index, said) for index, said in enumerate(turns)]

    def by_index(name: str) -> list[dict[str, Any]]:
        return sorted(rows(tmp_path / name), key=lambda row: row["index"])

    with open_file(tmp_path) as output:
        distill(make(), encode, fake_target(), output, num_together=num_together)
    expected = by_index("out.jsonl"), by_index("out.failed.jsonl"), output.num_tokens
    output.path.unlink()
    output.failed_path.unlink()
    if dies_after < 6:
        with open_file(tmp_path) as output, pytest.raises(RuntimeError, match="killed"):
            distill(make(), encode, fake_target(dies_after=dies_after), output, num_together=num_together)
        with output.path.open("a") as file:
            file.write('{"index": 2, "messa')

    with open_file(tmp_path) as output:
        left = [dialogue for dialogue in make() if not output.has(dialogue)]
        distill(left, encode, fake_target(), output, num_together=num_together)

    assert (by_index("out.jsonl"), by_index("out.failed.jsonl"), output.num_tokens) == expected
    assert output.num_records == len(expected[0])
    assert output.num_failed == len(expected[1])
    with open_file(tmp_path) as output:
        assert all(output.has(dialogue) for dialogue in make())


def test_of_a_conversation_that_failed_late_the_answers_count_as_finished_only_when_they_are_there(
    tmp_path: Path,
) -> None:
    with open_file(tmp_path) as output:
        distill([Dialogue(0, ["one two", "three four five six"])], encode, fake_target(), output)
    # killed between the two writes
    output.path.write_text("")

    with open_file(tmp_path) as output:
        assert not output.has(Dialogue(0, ["one two", "three four five six"]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda row: {**row, "made_by": {"target": "other"}},
            r"was made by \{'target': 'other'\}, but this run is \{'t",
        ),
        (lambda row: {"text": "own data"}, r"out.jsonl, line 1: not written by distill: write to another file"),
        (
            lambda row: row["messages"][0].update(content="other") or row,
            r"answers other prompts \(.* index 0 differs\)",
        ),
    ],
)
def test_a_file_of_something_else_is_not_gone_on_with(
    spoil: Callable[[dict[str, Any]], dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with open_file(tmp_path) as output:
        distill([Dialogue(0, ["a"])], encode, fake_target(), output)
    (row,) = rows(output.path)
    output.path.write_text(json.dumps(spoil(row)) + "\n")

    with pytest.raises(ValueError, match=message), open_file(tmp_path) as output:
        output.has(Dialogue(0, ["a"]))
