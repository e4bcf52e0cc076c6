"""The commands on real engines, as a user runs them, with the example pair."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "examples" / "models"
PAIR = ["--target", str(MODELS / "target"), "--drafter", str(MODELS / "drafter")]

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not (MODELS / "drafter").is_dir(), reason="the example pair is not there"),
]


def run(*arguments: str, expected_status: int = 0, timeout: int = 570) -> tuple[list[str], dict[str, Any]]:
    """Returns the lines of stdout and the JSON of the last one."""
    command = [sys.executable, "-m", "vllm_redrafter.cli.main", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == expected_status, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    return lines, json.loads(lines[-1])


def test_demo_shows_accepted_drafts_in_colour_identical_outputs_and_all_four_speeds() -> None:
    lines, summary = run("demo", "--max-tokens", "32", "--color", "always")

    assert summary["identical"] is True
    assert set(summary["tokens_per_second"]) == {"baseline", "chain", "tree", "auto"}
    assert min(summary["tokens_per_second"].values()) > 0
    rows = {line[:16].strip(): line.split() for line in lines[-6:-2]}
    # a baseline step yields one token; a tree of this drafter must yield clearly more
    assert float(rows["baseline"][2]) == 1.0
    assert float(rows["tree of 8"][4]) > 1.5
    # the answer stands behind the prompt, which is bold, and before what the colour means
    answer = "\n".join(lines).split("\x1b[1m")[1].split("\x1b[0m", 1)[1].split("\n\n(\x1b[32mthis colour")[0]
    drafted = re.findall("\x1b\\[32m(.*?)\x1b\\[0m", answer, re.DOTALL)
    # every step ends in a token of the target's own
    assert 0 < len("".join(drafted)) < len(re.sub("\x1b\\[\\d+m", "", answer))


def test_verify_finds_no_difference_and_has_tried_the_branches() -> None:
    _, summary = run("verify", *PAIR, "--max-tokens", "48")

    assert summary["identical"] is True
    assert summary["first_difference"] is None
    assert summary["num_branch_acceptances"] > 0
    assert summary["mean_acceptance_length"] > 1.5


def test_generate_answers_a_file_of_conversations_and_refuses_only_what_is_too_long(tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    entries = [
        {"turns": ["What is a list?", "And a tuple?"]},
        {"prompt": "word " * 20_000},
        {"prompt": "A list is"},
    ]
    prompts.write_text("\n".join(map(json.dumps, entries)))

    _, summary = run(
        "generate", *PAIR, "--prompts", str(prompts), "--output", str(output), "--batch-size", "2", "--max-tokens", "16"
    )

    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["turn"] for row in rows] == [1, 2, 1, 1]
    assert ["tokens, but prompt and answer together" in row.get("error", "") for row in rows] == [
        False,
        False,
        True,
        False,
    ]
    assert all(0 < row["tokens"] <= 16 and row["response"] for row in rows if "error" not in row)
    assert (summary["num_prompts"], summary["num_errors"]) == (4, 1)
    assert summary["tokens"] == sum(row["tokens"] for row in rows)


def test_what_the_engine_refuses_reaches_the_user_as_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    command = [sys.executable, "-m", "vllm_redrafter.cli.main", "generate", *PAIR[:2]]

    result = subprocess.run(
        [*command, "--drafter", str(tmp_path), "--prompt", "a"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )

    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("vllm-redrafter generate: ")
    assert str(tmp_path) in message
    log = Path(message.rsplit("its log is ", 1)[1].rstrip(")"))
    assert "Traceback" in log.read_text()
    log.unlink()


def test_doctor_finds_nothing_that_stops_this_environment() -> None:
    lines, summary = run("doctor")

    assert summary == {"ok": True, "problems": []}
    assert any(line.startswith("patch contracts") for line in lines)
    assert any(line.startswith("pipeline parallelism") for line in lines)
