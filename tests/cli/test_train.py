"""`train` and `evaluate` as a user types them, on a target of a few thousand weights."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engine.tiny_models import CHARACTERS, make_llama, save_target
from vllm_redrafter.cli import train
from vllm_redrafter.cli.main import main
from vllm_redrafter.core import checkpoint


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_target(make_llama(), tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    lines = [{"text": CHARACTERS[i % 20 :] * 2, "source": "odd" if i % 2 else "even"} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def command(target: str, data: str, output: Path, *more: str) -> list[str]:
    few = ["--max-steps", "3", "--batch-size", "2", "--max-length", "200", "--exit-dim", "32", "--no-bf16"]
    return ["train", "--target", target, "--data", data, "--output", str(output), *few, *more]


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


def test_a_drafter_is_trained_and_evaluated(
    target: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "drafter"
    typed = command(target, data, output, "--draft_vocab_size", "40", "--num-evaluations", "1")
    monkeypatch.setattr(sys, "argv", ["vllm-redrafter", *typed])

    assert main(typed) == 0

    out = capsys.readouterr().out.splitlines()
    assert out[-2].startswith(f"vllm serve {target} --speculative-config ")
    trained = json.loads(out[-1])
    assert (trained["drafter"], trained["num_steps"], trained["stopped"]) == (str(output), 3, False)
    assert trained["mean_acceptance_length"] >= 1
    assert checkpoint.load_drafter(output).config.draft_vocab_size == 40
    told = json.loads((output / "provenance.json").read_text())
    assert "--draft_vocab_size 40" in told["command"]
    assert [each["name"] for each in told["data"]] == ["text.jsonl"]
    assert len(told["data"][0]["sha256"]) == 64

    few = ["--num-prompts", "3", "--max-tokens", "12", "--nodes", "2,8"]
    assert main(["evaluate", "--target", target, "--drafter", str(output), "--data", data, *few]) == 0

    found = last_line(capsys)
    written = json.loads((output / "evaluation.json").read_text())
    assert written == {name: found[name] for name in ("offsets", "acceptance")}
    seen = {(row["source"], row["temperature"], row["beam_width"], row["num_nodes"]) for row in written["acceptance"]}
    assert {("all", 0.0, 4, 8), ("odd", 1.0, 4, 2), ("even", 0.0, 1, 2)} <= seen
    assert [row["offset"] for row in written["offsets"]] == [1, 2, 3, 4, 5, 6]
    (largest,) = (
        row["mean_acceptance_length"]
        for row in written["acceptance"]
        if (row["source"], row["temperature"], row["beam_width"], row["num_nodes"]) == ("all", 0.0, 4, 8)
    )
    assert (found["num_nodes"], found["mean_acceptance_length"]) == (8, largest)

    chain = ["--beam-width", "1", "--temperature", "0", "--output", str(tmp_path / "chain.json")]
    assert main(["evaluate", "--target", target, "--drafter", str(output), "--data", data, *few, *chain]) == 0

    assert {row["beam_width"] for row in last_line(capsys)["acceptance"]} == {1}
    assert json.loads((output / "evaluation.json").read_text()) == written


def test_an_output_that_is_not_empty_is_not_overwritten_by_accident(
    target: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("")

    assert main(command(target, data, tmp_path)) == 1

    error = capsys.readouterr().err
    assert "is not empty: pass --resume to go on, --overwrite to start anew, or another" in error


def test_a_drafter_with_fused_layers_is_trained_and_evaluated(
    target: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "drafter"

    assert main(command(target, data, output, "--fused_layers", "1,0", "--num-evaluations", "1")) == 0

    trained, drafter = last_line(capsys), checkpoint.load_drafter(output)
    assert trained["mean_acceptance_length"] >= 1
    assert drafter.config.fused_layers == [0, 1]
    assert drafter.fc.weight.abs().sum() > 0
    assert json.loads((output / "provenance.json").read_text())["recipe"]["fused_layers"] == [1, 0]

    few = ["--num-prompts", "2", "--max-tokens", "8", "--nodes", "4", "--temperature", "0"]
    assert main(["evaluate", "--target", target, "--drafter", str(output), "--data", data, *few]) == 0
    assert last_line(capsys)["mean_acceptance_length"] >= 1


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["--data", "d.jsonl", "--output", "o"], 2, "--target is missing"),
        (["--target", "{target}", "--output", "o"], 2, "--data is missing: pass a file of text, or --quick"),
        (["--target", "{target}", "--data", "d.jsonl"], 2, "--output is missing"),
        (["--target", "./nowhere", "--data", "d", "--output", "o"], 1, "no directory './nowhere'"),
        (["--target", "{target}", "--data", "{tmp}/no.jsonl", "--output", "{tmp}/o"], 1, "no file "),
        (["--target", "{target}", "--data", "{tmp}/empty.jsonl", "--output", "{tmp}/o"], 1, "empty.jsonl is empty"),
        (["--target", "{target}", "--data", "{tmp}/poor.jsonl", "--output", "{tmp}/o"], 1, "2 × empty text"),
        (["--target", "{target}", "--quick", "--output", "{tmp}/o", "--max-length", "999"], 1, "has 512 positions"),
        (["--target", "{target}", "--quick", "--output", "{tmp}/o", "--fused-layers", "0,2"], 1, "target's are 0 to 1"),
        (["--target", "{target}", "--quick", "--output", "{tmp}/o", "--own-tokens", "2"], 1, "it must lie in 0..1"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(
    arguments: list[str], status: int, reason: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "poor.jsonl").write_text('{"text": ""}\n{"text": " "}\n')

    found = main(["train", *(each.format(target=target, tmp=tmp_path) for each in arguments)])

    assert found == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vllm-redrafter train: ")
    assert reason in error


@pytest.mark.parametrize("option", [["--loss", "mse"], ["--num-offsets", "0"], ["--learning-rate", "-1"], ["--what"]])
def test_an_option_that_makes_no_sense_ends_with_the_status_of_usage(option: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--quick", "--output", "o", *option])

    assert ended.value.code == 2


@pytest.mark.slow
def test_a_training_that_is_told_to_end_saves_and_can_be_resumed(target: str, data: str, tmp_path: Path) -> None:
    output = tmp_path / "drafter"
    long = ["--max-steps", "100000", "--num-evaluations", "1000"]
    program = [sys.executable, "-m", "vllm_redrafter.cli.main", *command(target, data, output), *long]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 240
    while not list(output.glob("checkpoints/*/trainer_state.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.2)

    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)

    assert process.returncode == 0
    told = json.loads(out.splitlines()[-1])
    assert told["stopped"]
    assert "the same command with --resume goes on" in out
    assert checkpoint.load_drafter(output).config.exit_dim == 32
    last = max(int(path.parent.name.rpartition("-")[2]) for path in output.glob("checkpoints/*/trainer_state.json"))
    assert last == told["num_steps"]


@pytest.mark.parametrize(("typed", "given"), [("300", 300), ("all", "all")])
def test_the_draft_vocabulary_has_a_size_or_is_all(typed: str, given: int | str) -> None:
    parser = argparse.ArgumentParser()
    train.add_parser(parser.add_subparsers())

    assert train._given(parser.parse_args(["train", "--draft-vocab-size", typed])) == {"draft_vocab_size": given}


@pytest.mark.parametrize("typed", ["0", "some", "-3"])
def test_another_draft_vocabulary_is_refused(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--draft-vocab-size", typed])

    assert f"'{typed}' is neither an integer of at least 1 nor 'all'" in capsys.readouterr().err


def test_every_field_of_the_objective_that_has_an_option_is_taken_from_it() -> None:
    parser = argparse.ArgumentParser()
    train.add_parser(parser.add_subparsers())
    given = {"loss": "lk", "num_offsets": 3, "decay": 0.5, "reach": 0.25, "own_tokens": 0.125}
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    assert train._given(parser.parse_args(["train", *options])) == given
