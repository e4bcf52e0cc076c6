from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import FakePair
from vllm_redrafter.cli.main import main

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "examples" / "models" / "target"
DRAFTER = ROOT / "examples" / "models" / "drafter"
TEXT = ROOT / "examples" / "models" / "prompts.txt"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

Distill = Callable[..., int]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return summary


@pytest.fixture
def make_distill(fake_pair: FakePair, tmp_path: Path) -> Callable[..., Distill]:
    """Makes a command that distils a list of prompts into out.jsonl, with a fake engine that behaves as asked."""

    def make(prompts: list[Any], **behaviour: Any) -> Distill:
        target, _ = fake_pair(**behaviour)
        for name in TOKENIZER_FILES:
            shutil.copy(TARGET / name, target)
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
        files = ["--prompts", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "out.jsonl")]

        def distill(*options: str) -> int:
            return main(["distill", "--target", target, *files, *options])

        return distill

    return make


def test_answers_are_written_with_the_tokens_of_the_prompt_as_served(
    make_distill: Callable[..., Distill], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill = make_distill([{"prompt": "What is zip?", "category": "python"}, {"prompt": "And map?"}])

    status = distill("--max-tokens", "3", "--top-p", "0.9")

    assert status == 0
    first, second = rows_of(tmp_path / "out.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    prompt_ids = tokenizer.encode("User: What is zip?\nAssistant:")
    # the fake says what it was told
    assert first["token_ids"] == [*prompt_ids, *prompt_ids[:3]]
    assert first["target_spans"] == [[len(prompt_ids), len(prompt_ids) + 3]]
    assert (first["source"], second["source"]) == ("python", "p")
    assert first["made_by"] | {"target": ""} == {
        "target": "",
        "raw": False,
        "temperature": 0.0,
        "top_p": 0.9,
        "seed": None,
        "max_tokens": 3,
    }
    assert last_line(capsys) == {
        "output": str(tmp_path / "out.jsonl"),
        "num_records": 2,
        "num_failed": 0,
        "num_tokens": 6,
        "tokens_per_second": 6.0,
    }


def test_raw_prompts_are_read_as_text(make_distill: Callable[..., Distill], tmp_path: Path) -> None:
    distill = make_distill([{"turns": ["def f(x):", "def g"]}])

    distill("--max-tokens", "1", "--raw")

    (row, *_) = rows_of(tmp_path / "out.jsonl")
    assert row["token_ids"][:-1] == AutoTokenizer.from_pretrained(TARGET).encode("def f(x):")


def test_texts_are_gone_on_with_from_their_openings(
    make_distill: Callable[..., Distill], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill = make_distill([])
    (tmp_path / "p.txt").write_text("One day a dog ran.\n<|endoftext|>\nOne day a cat sat down.\n<|endoftext|>\nNo.\n")
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    dog, cat = (tokenizer.encode(text) for text in ("One day a dog ran.", "One day a cat sat down."))
    shared = next(i for i in range(len(dog)) if dog[i] != cat[i])

    status = distill("--max-tokens", "1", "--prompts", str(tmp_path / "p.txt"), "--openings", f"{shared},{shared + 1}")

    assert status == 0
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["token_ids"][:-1] for row in rows] == [dog[:shared], dog[: shared + 1], cat[: shared + 1]]
    assert {row["source"] for row in rows} == {"p"}
    assert last_line(capsys)["num_records"] == 3
    # the same run again has nothing left to do; other openings are other prompts
    again = ("--max-tokens", "1", "--prompts", str(tmp_path / "p.txt"), "--resume", "--openings")
    assert distill(*again, f"{shared},{shared + 1}") == 0
    assert last_line(capsys)["tokens_per_second"] is None
    assert distill(*again, f"{shared + 1}") == 1
    assert "answers other prompts" in capsys.readouterr().err


def test_prompts_without_an_answer_stand_beside_with_the_reason(
    make_distill: Callable[..., Distill], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "more words than it takes, " * 9
    distill = make_distill([{"prompt": "ok"}, {"prompt": long}, {"prompt": " "}, {"answer": "x"}], max_words=30)

    status = distill("--max-tokens", "2")

    assert status == 0
    assert [row["index"] for row in rows_of(tmp_path / "out.jsonl")] == [0]
    failed = {row["index"]: row for row in rows_of(tmp_path / "out.failed.jsonl")}
    assert failed[1]["reason"] == "too long"
    assert failed[1]["turns"] == [long]
    assert "line 3, prompt: no text of a user in it" in failed[2]["reason"]
    assert "line 4: no prompt among the keys ['answer']" in failed[3]["reason"]
    assert last_line(capsys)["num_failed"] == 3


def test_an_output_that_is_there_is_kept_unless_it_is_to_be_replaced(
    make_distill: Callable[..., Distill], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill = make_distill([{"prompt": "a"}])
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")

    assert distill() == 1
    assert f"{output} is there already: pass --resume to go on with it or --overwrite" in capsys.readouterr().err
    assert distill("--resume") == 1
    assert f"{output}, line 1: not written by distill: write to another file" in capsys.readouterr().err
    assert output.read_text() == "precious\n"
    assert distill("--overwrite", "--max-tokens", "1") == 0
    assert [row["index"] for row in rows_of(output)] == [0]


def test_a_run_that_died_goes_on_with_what_is_left_and_the_same_seeds(
    make_distill: Callable[..., Distill], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill = make_distill([{"prompt": word} for word in ("a", "b", "c", "d", " ")], dies_after=2)
    output, sampled = tmp_path / "out.jsonl", ["--max-tokens", "2", "--temperature", "1", "--seed", "5"]

    assert distill(*sampled) == 1
    assert "out of paper" in capsys.readouterr().err
    assert [row["index"] for row in rows_of(output)] == [0, 1]
    assert distill(*sampled, "--resume", "--top-p", "0.5") == 1
    assert "'top_p': 1.0" in capsys.readouterr().err
    # it dies after every second answer, when nothing is left to do
    assert distill(*sampled, "--resume") == 1
    capsys.readouterr()
    assert distill(*sampled, "--resume") == 0

    summary = last_line(capsys)
    assert [row["index"] for row in rows_of(output)] == [0, 1, 2, 3]
    assert [row["index"] for row in rows_of(tmp_path / "out.failed.jsonl")] == [4]
    assert (summary["num_records"], summary["num_failed"], summary["num_tokens"]) == (4, 1, 8)
    # the last run had nothing to do, and started no engine
    assert summary["tokens_per_second"] is None


def test_a_seed_is_a_prompt_s_own(make_distill: Callable[..., Distill], tmp_path: Path) -> None:
    distill = make_distill([{"turns": ["a", "b"]}, {"prompt": "c"}], echoes="seed")

    distill("--max-tokens", "1", "--temperature", "1", "--seed", "5")

    rows = rows_of(tmp_path / "out.jsonl")
    said = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
    assert sorted(set(said)) == ["1005", "5", "6"]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--output", "out.json"], 2, "--output 'out.json' is no .jsonl: name it so"),
        (["--output", "missing/out.jsonl"], 1, "cannot write 'missing/out.jsonl': No such file or directory"),
        (["--prompts", "missing.txt"], 1, "no file 'missing.txt': pass a file of prompts"),
        (["--drafter", "/nowhere"], 1, "--drafter: no directory '/nowhere'"),
        (["--openings", "8"], 2, "entry 1: no text to cut: leave out --openings for prompts"),
        (["--openings", "8", "--prompts", "missing.txt"], 1, "no file 'missing.txt': pass a data file"),
        (["--openings", "900,800", "--prompts", str(ROOT / "README.md")], 1, "README.md is neither .json, .jsonl nor"),
        (["--openings", "90000,99999", "--prompts", str(TEXT)], 1, "has more than 90000 tokens: pass shorter"),
    ],
)
def test_what_cannot_work_is_refused_before_an_engine_starts(
    options: list[str],
    status: int,
    message: str,
    make_distill: Callable[..., Distill],
    capsys: pytest.CaptureFixture[str],
) -> None:
    distill = make_distill([{"prompt": "a"}], log="an engine was started")

    assert distill(*options) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_target_without_a_tokenizer_is_refused(
    make_distill: Callable[..., Distill], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill = make_distill([{"prompt": "a"}], log="an engine was started")
    for name in TOKENIZER_FILES:
        (tmp_path / "target" / name).unlink()

    assert distill() == 1
    error = capsys.readouterr().err
    assert "no tokenizer for" in error
    assert error.count("\n") == 1


def test_where_nothing_can_be_answered_the_command_fails(
    make_distill: Callable[..., Distill], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill = make_distill([{"prompt": "a b c d e f"}], max_words=1)

    assert distill() == 1
    assert f"no prompt could be answered: {tmp_path / 'out.failed.jsonl'} says why" in capsys.readouterr().err


def test_a_command_that_is_killed_goes_on_with_what_is_left(
    make_distill: Callable[..., Distill], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill = make_distill([{"prompt": word} for word in ("a", "b", "c")], hangs=True)
    output = tmp_path / "out.jsonl"
    fake = Path(__file__).with_name("fake_engine_child.py")
    code = (
        "import sys; from vllm_redrafter.cli import engine, main\n"
        f"engine.CHILD_COMMAND = (sys.executable, {str(fake)!r})\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    target = str(tmp_path / "target")
    arguments = ["--target", target, "--prompts", str(tmp_path / "p.jsonl"), "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "distill", *arguments, "--max-tokens", "2"], cwd=ROOT, stderr=subprocess.PIPE
    )
    while process.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert [row["index"] for row in rows_of(output)] == [0]
    (tmp_path / "target" / "fake.json").write_text("{}")

    assert distill("--max-tokens", "2", "--resume") == 0

    assert [row["index"] for row in rows_of(output)] == [0, 1, 2]
    assert last_line(capsys)["num_records"] == 3


@pytest.mark.engine
def test_the_example_target_s_greedy_tokens_are_written_also_with_a_drafter(tmp_path: Path) -> None:
    prompts = [
        {"turns": ["What does zip do?", "Show it."]},
        {"prompt": "What is a set?"},
        {"prompt": "word " * 400},
        {"prompt": ""},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "vllm_redrafter.cli.main", "distill", "--target", str(TARGET)]
    command += ["--drafter", str(DRAFTER), "--prompts", str(tmp_path / "p.jsonl"), "--output", str(output)]
    command += ["--max-tokens", "48", "--max-model-len", "256"]

    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    rows, failed = rows_of(output), rows_of(tmp_path / "out.failed.jsonl")
    summary = json.loads(result.stdout)
    assert sorted({row["index"] for row in rows}) == [0, 1]
    assert {row["index"]: row["reason"].partition(" may have ")[2] for row in failed}[2] == "256: shorten it"
    assert (summary["num_records"], summary["num_failed"]) == (len(rows), 2)
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    for row in rows:
        token_ids = torch.tensor(row["token_ids"])
        with torch.no_grad():
            logits = model(token_ids[None]).logits[0]
        for start, end in row["target_spans"]:
            chosen = logits[start - 1 : end - 1].gather(1, token_ids[start:end, None])[:, 0]
            # each is the most probable token, up to the rounding of another implementation
            assert (logits[start - 1 : end - 1].amax(dim=1) - chosen).max() < 1e-3
