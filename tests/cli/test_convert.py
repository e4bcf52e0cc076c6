from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_redrafter.cli import convert as command
from vllm_redrafter.cli.main import main
from vllm_redrafter.core import checkpoint, conversion, formats
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter


@pytest.fixture
def apple(tmp_path: Path) -> Path:
    """A drafter in Apple's format."""
    drafter = ReDrafter(ReDrafterConfig(hidden_size=4, vocab_size=60, top_k=50))
    checkpoint.save_as_apple(drafter, tmp_path / "apple")
    return tmp_path / "apple"


def test_the_command_offers_the_formats_that_there_are() -> None:
    assert tuple(formats.DIALECTS) == command.SOURCE_FORMATS
    assert conversion.TARGET_FORMATS == command.TARGET_FORMATS


def test_there_and_back_gives_the_same_weights(apple: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, again = tmp_path / "ours", tmp_path / "again"

    assert main(["convert", "--from", "apple", str(apple), str(ours), "--target", "org/target"]) == 0
    first = capsys.readouterr().out.splitlines()
    assert main(["convert", "--to", "apple", str(ours), str(again)]) == 0
    second = capsys.readouterr().out.splitlines()

    assert (again / "model.safetensors").read_bytes() == (apple / "model.safetensors").read_bytes()
    assert json.loads(first[-1]) == {
        "directory": str(ours),
        "from": "apple",
        "to": "redrafter",
        "num_parameters": 660,
        "verifier": "org/target",
    }
    assert second[0] == (
        "note: Apple's format holds neither beam shape nor target; pass --beam_width=4 --beam_length=5 to its programs"
    )


def test_a_drafter_without_a_target_is_noted(apple: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--from", "apple", str(apple), str(tmp_path / "ours")]) == 0

    assert capsys.readouterr().out.startswith("note: the config names no target: repeat with --target, or always pass")


def test_the_target_of_a_drafter_of_ours_can_be_recorded_anew(apple: Path, tmp_path: Path) -> None:
    assert main(["convert", "--from", "apple", str(apple), str(tmp_path / "ours")]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "named"), "--target", "org/target"]) == 0

    assert checkpoint.load_config(tmp_path / "named").verifier == "org/target"


def test_nothing_to_convert_is_wrong_usage(apple: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--from", "apple", "--to", "apple"]):
        assert main(["convert", str(apple), str(tmp_path / "ours"), *arguments]) == 2
        assert "there is nothing to convert: pass --from with the format of SRC" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--from", "trtllm", "{apple}", "{tmp}/ours"],
            "is not in TensorRT-LLM's format but in Apple's: pass --from apple",
        ),
        (["--from", "apple", "{apple}", "{tmp}"], "is there and not empty: pass another directory, or --overwrite"),
        (["--from", "apple", "{tmp}/absent", "{tmp}/ours"], "no drafter at '"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_status_1(
    arguments: list[str], message: str, apple: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["convert", *(argument.format(apple=apple, tmp=tmp_path) for argument in arguments)])

    captured = capsys.readouterr()
    assert status == 1
    assert captured.err.startswith("vllm-redrafter convert: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
