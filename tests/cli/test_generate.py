from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import FakePair
from vllm_redrafter.cli.answers import NO_EARLIER_ANSWER
from vllm_redrafter.cli.main import main


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return summary


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prompts_are_answered_on_stdout_and_summed_up_in_the_last_line(
    fake_pair: FakePair, capsys: pytest.CaptureFixture[str]
) -> None:
    target, drafter = fake_pair()

    status = main(
        ["generate", "--target", target, "--drafter", drafter, "--prompt", "a b", "--prompt", "c", "--max-tokens", "5"]
    )

    assert status == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == ["> a b", "a b a b a", "", "> c", "c c c c c", ""]
    assert json.loads(lines[-1]) == {
        "num_prompts": 2,
        "num_errors": 0,
        "tokens": 10,
        "tokens_per_second": 20.0,
        "tokens_per_step": 2.0,
        "method": "redrafter",
        "output": None,
    }


def test_every_turn_of_a_file_gets_a_row_in_the_order_of_the_file(
    fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, _ = fake_pair(max_words=6)
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    entries = [
        {"turns": ["one", "two"]},
        {"prompt": "this has more words than it takes"},
        {"turns": ["so has the first of these two", "never"]},
        {"prompt": "drei ä"},
    ]
    prompts.write_text("\n".join(map(json.dumps, entries)))
    few = ["--batch-size", "3", "--max-tokens", "2"]

    status = main(
        ["generate", "--target", target, "--baseline", "--prompts", str(prompts), "--output", str(output), *few]
    )

    rows = rows_of(output)
    assert status == 0
    assert [(row["prompt"], row["turn"], row["response"], row.get("error")) for row in rows] == [
        ("one", 1, "one one", None),
        # the first turn and its answer stand before the second
        ("two", 2, "one /", None),
        ("this has more words than it takes", 1, None, "too long"),
        ("so has the first of these two", 1, None, "too long"),
        ("never", 2, None, NO_EARLIER_ANSWER),
        ("drei ä", 1, "drei ä", None),
    ]
    assert rows[0] == {
        "prompt": "one",
        "response": "one one",
        "method": "baseline",
        "tokens": 2,
        "tokens_per_step": 1.0,
        "seconds": 0.25,
        "turn": 1,
    }
    summary = last_line(capsys)
    assert (summary["num_prompts"], summary["num_errors"], summary["tokens"]) == (6, 3, 6)
    assert (summary["method"], summary["output"]) == ("baseline", str(output))


def test_where_no_prompt_can_be_answered_the_command_fails_with_the_reason(
    fake_pair: FakePair, capsys: pytest.CaptureFixture[str]
) -> None:
    target, _ = fake_pair(max_words=1)

    assert main(["generate", "--target", target, "--baseline", "--prompt", "a b"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[:2] == ["> a b", "(no answer: too long)"]
    assert "no prompt could be answered, the first because too long" in captured.err


def test_a_chat_streams_and_remembers_until_exit(
    fake_pair: FakePair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, drafter = fake_pair(max_words=7)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nyou\nthis is one too many\nagain\nexit\nnever said\n"))

    status = main(["generate", "--target", target, "--drafter", drafter, "--interactive", "--max-tokens", "3"])

    captured = capsys.readouterr()
    assert status == 0
    # the fake joins the words of a conversation with slashes
    assert captured.out.splitlines()[:-1] == ["hi hi hi ", "hi / hi ", "again again again "]
    assert "too long; the conversation starts anew" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["num_prompts"] == 4


def test_a_raw_conversation_is_one_text(fake_pair: FakePair, tmp_path: Path) -> None:
    target, _ = fake_pair()
    prompts, output = tmp_path / "p.json", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps([{"turns": ["one ", "two"]}]))
    raw = ["--raw", "--max-tokens", "4"]

    main(["generate", "--target", target, "--baseline", "--prompts", str(prompts), "--output", str(output), *raw])

    assert [row["response"] for row in rows_of(output)] == ["one one one one", "one one one one"]


@pytest.mark.parametrize(
    ("raw", "responses"), [([], ["s / one s", "s / one /"]), (["--raw"], ["s one s one", "s ones one s"])]
)
def test_what_a_file_says_as_the_system_stands_before_every_turn(
    raw: list[str], responses: list[str], fake_pair: FakePair, tmp_path: Path
) -> None:
    target, _ = fake_pair()
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    said = [("system", "s"), ("user", "one"), ("assistant", "never read"), ("user", "two")]
    prompts.write_text(json.dumps({"messages": [{"role": role, "content": content} for role, content in said]}))
    more = ["--max-tokens", "4", *raw]

    main(["generate", "--target", target, "--baseline", "--prompts", str(prompts), "--output", str(output), *more])

    # the fake repeats what it is given, and joins messages with slashes
    assert [row["response"] for row in rows_of(output)] == responses


@pytest.mark.parametrize("pair", [[], ["--drafter", "{drafter}", "--baseline"]])
def test_either_a_drafter_or_baseline_is_asked_for(
    pair: list[str], fake_pair: FakePair, capsys: pytest.CaptureFixture[str]
) -> None:
    target, drafter = fake_pair(log="an engine was started")

    status = main(["generate", "--target", target, *(word.format(drafter=drafter) for word in pair), "--prompt", "a"])

    assert status == 2
    assert capsys.readouterr().err == "vllm-redrafter generate: pass either --drafter or --baseline\n"


def test_an_output_that_cannot_be_written_is_refused_before_an_engine_starts(
    fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, _ = fake_pair(log="an engine was started")
    output = tmp_path / "missing" / "out.jsonl"

    assert main(["generate", "--target", target, "--baseline", "--prompt", "a", "--output", str(output)]) == 1
    assert f"cannot write '{output}': No such file or directory" in capsys.readouterr().err


def test_what_was_answered_before_the_engine_died_is_in_the_file(
    fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, _ = fake_pair(dies_after=2)
    prompts, output = tmp_path / "p.txt", tmp_path / "out.jsonl"
    prompts.write_text("a\nb\nc\n")

    status = main(["generate", "--target", target, "--baseline", "--prompts", str(prompts), "--output", str(output)])

    assert status == 1
    assert [row["prompt"] for row in rows_of(output)] == ["a", "b"]
    reason = f"generate: out of paper (the engine for {target!r} ended with status 1, its log is"
    assert reason in capsys.readouterr().err
