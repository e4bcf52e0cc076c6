from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_redrafter.cli.errors import CommandError
from vllm_redrafter.cli.prompts import Conversation, read_conversations

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "text"

# laid out as the published sets, in our own words
MT_BENCH = r"""
{"question_id": 1, "category": "writing", "turns": ["Write a note to a neighbour.", "Make it rhyme."]}
{"question_id": 2, "category": "roleplay", "turns": ["Say \"caf\u00e9\" in French.", "Encore, s'il vous pla\u00eet."]}
{"question_id": 3, "category": "reasoning", "turns": ["Who is last of two?", "And of one?"], "reference": ["B", "A"]}
{"question_id": 4, "category": "coding", "turns": ["What does this print?\n\n```\nprint(1)\n```", "And\tprint(2)?"]}
{"question_id": 5, "category": "math", "turns": ["Solve x + 1 = {2}.", "Solve it again."], "reference": ["1", ""]}
"""
GSM8K = r"""
{"question": "Ann\u2019s hen lays 3 eggs a day.  How many in 2 days?", "answer": "2 * 3 = <<2*3=6>>6\n#### 6"}
{"question": "A pen costs $2 and a book $5. What do both cost?", "answer": "$2 + $5 = $<<2+5=7>>7\n#### 7"}
{"question": "Bo walks 4 km.\nHe is halfway. How far is it?", "answer": "4 * 2 = <<4*2=8>>8 km\n#### 8"}
{"question": "50% of 10 apples are red. How many?", "answer": "10 * .5 = <<10*.5=5>>5\n#### 5"}
{"question": "Cy has 1,000 \"coins\" and loses 1. How many are left?", "answer": "<<1000-1=999>>999\n#### 999"}
"""
SHARE_GPT = r"""
[
  {
    "id": "aB3_0",
    "conversations": [
      {"from": "human", "value": "Name a tree..."},
      {"from": "gpt", "value": "An oak."},
      {"from": "human", "value": "And\nanother?"},
      {"from": "gpt", "value": "1. An elm.\n2. A yew."}
    ]
  },
  {"id": "aB3_1", "conversations": [{"from": "gpt", "value": "\u2026cut off"}, {"from": "human", "value": "continue"}]},
  {"id": "cD4", "conversations": [{"from": "system", "value": "Brief"}, {"from": "human", "value": "Hi \ud83d\ude00"}]},
  {"id": "eF5_0", "conversations": [{"from": "user", "value": "<b>Bold</b>?"}, {"from": "chatgpt", "value": "Yes."}]},
  {"id": "gH6_0", "conversations": [{"from": "human", "value": "Say it twice."}, {"from": "human", "value": "Please."}]}
]
"""


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_plain_text_is_one_prompt_per_line_without_the_blank_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "prompts.txt", "\N{ZERO WIDTH NO-BREAK SPACE}One\n\n{ two\r\n  [three]  \n")

    assert read_conversations(path) == [
        Conversation(("One",)),
        Conversation(("{ two",)),
        Conversation(("  [three]  ",)),
    ]


def test_jsonl_takes_prompt_text_instruction_question_and_bare_strings(tmp_path: Path) -> None:
    entries = [
        {"prompt": "a", "id": 1},
        {"text": "b"},
        {"instruction": "c", "input": "", "output": "x"},
        {"instruction": "d", "input": "e"},
        {"question": "f", "answer": "x"},
        "g",
    ]
    path = write(tmp_path, "p.jsonl", "\n\n".join(json.dumps(entry) for entry in entries))

    assert [item.turns for item in read_conversations(path)] == [("a",), ("b",), ("c",), ("d\n\ne",), ("f",), ("g",)]


def test_mt_bench_keeps_both_turns_and_conversations_what_the_human_says(tmp_path: Path) -> None:
    mt_bench = write(tmp_path, "q.jsonl", json.dumps({"question_id": 81, "turns": ["first", "second"]}))
    messages = [("system", "s"), ("human", "h1"), ("gpt", "g1"), ("user", "h2")]
    conversation = {"id": "x", "conversations": [{"from": who, "value": text} for who, text in messages]}
    share_gpt = write(tmp_path, "s.json", json.dumps([conversation], indent=1))
    openai = [{"role": "developer", "content": "s"}, *({"role": who, "content": text} for who, text in messages)]
    openai_messages = write(tmp_path, "o.jsonl", json.dumps({"messages": openai}))

    assert read_conversations(mt_bench) == [Conversation(("first", "second"))]
    assert read_conversations(share_gpt) == [Conversation(("h1", "h2"), "s")]
    assert read_conversations(openai_messages) == [Conversation(("h1", "h2"), "s")]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "mt_bench.jsonl",
            MT_BENCH,
            [
                Conversation(("Write a note to a neighbour.", "Make it rhyme.")),
                Conversation(('Say "café" in French.', "Encore, s'il vous plaît.")),
                Conversation(("Who is last of two?", "And of one?")),
                Conversation(("What does this print?\n\n```\nprint(1)\n```", "And\tprint(2)?")),
                Conversation(("Solve x + 1 = {2}.", "Solve it again.")),
            ],
        ),
        (
            "gsm8k.jsonl",
            GSM8K,
            [
                Conversation(("Ann\N{RIGHT SINGLE QUOTATION MARK}s hen lays 3 eggs a day.  How many in 2 days?",)),
                Conversation(("A pen costs $2 and a book $5. What do both cost?",)),
                Conversation(("Bo walks 4 km.\nHe is halfway. How far is it?",)),
                Conversation(("50% of 10 apples are red. How many?",)),
                Conversation(('Cy has 1,000 "coins" and loses 1. How many are left?',)),
            ],
        ),
        (
            "share_gpt.json",
            SHARE_GPT,
            [
                Conversation(("Name a tree...", "And\nanother?")),
                Conversation(("continue",)),
                Conversation(("Hi \N{GRINNING FACE}",), "Brief"),
                Conversation(("<b>Bold</b>?",)),
                Conversation(("Say it twice.", "Please.")),
            ],
        ),
    ],
)
def test_the_layouts_of_published_prompt_sets_are_read_whole(
    tmp_path: Path, name: str, text: str, expected: list[Conversation]
) -> None:
    assert read_conversations(write(tmp_path, name, text)) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", " \n\t\n", "is empty: put one prompt"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": b}\n', r"line 3: no JSON \(Expecting value, column 12\)"),
        ("p.json", '[\n  {"prompt": "a"},\n  oops\n]', "line 3: no JSON"),
        ("p.json", '{"prompt": "a"}', "holds no list: name it .jsonl"),
        ("p.json", "[]", "empty list"),
        ("p.jsonl", "17", "line 1: int, but each entry"),
        ("p.jsonl", '{"prompt": "a"}\n{"replies": []}', r"line 2: no prompt among the keys \['replies'\]"),
        ("p.jsonl", '{"messages": []}', "line 1, messages: no text of a user"),
        ("p.jsonl", '{"prompt": 3}', "line 1, prompt: no text of a user"),
        ("p.jsonl", '{"turns": []}', "line 1, turns: no text of a user"),
        ("p.json", '[{"conversations": [{"from": "gpt", "value": "x"}]}]', "entry 1, conversations: no text of a user"),
        ("p.json", '[{"conversations": "x"}]', "entry 1: conversations must be a list"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        read_conversations(write(tmp_path, name, text))


def test_a_file_that_cannot_be_read_as_text_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "p.jsonl.gz"
    binary.write_bytes(b"\x1f\x8b\x08")

    with pytest.raises(CommandError, match="no file"):
        read_conversations(tmp_path / "missing.txt")
    with pytest.raises(CommandError, match=r"no UTF-8 text \(byte 1\)"):
        read_conversations(binary)
    with pytest.raises(CommandError, match=r"cannot read .*: Is a directory"):
        read_conversations(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is not there")
@pytest.mark.parametrize(
    ("name", "conversations", "turns"),
    [
        ("mt_bench_question.jsonl", 80, {2}),
        ("gsm8k_test.jsonl", 1319, {1}),
        ("sharegpt_tiny.json", 1, None),
    ],
)
def test_published_prompt_sets_are_read_whole(name: str, conversations: int, turns: set[int] | None) -> None:
    found = read_conversations(REAL / name)

    assert len(found) == conversations
    expected = turns or {sum(m["from"] == "human" for m in json.loads((REAL / name).read_text())[0]["conversations"])}
    assert {len(item.turns) for item in found} == expected
