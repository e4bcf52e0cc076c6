from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.cli.conftest import FakePair
from vllm_redrafter.cli import demo, race
from vllm_redrafter.cli.generation import Answer, Generation, merge
from vllm_redrafter.cli.main import main
from vllm_redrafter.core.checkpoint import load_drafter

FILE = "one two three\nfour\n"


def run(fake_pair: FakePair, tmp_path: Path, *more: str, **behaviour: object) -> int:
    target, drafter = fake_pair(**behaviour)
    prompts = tmp_path / "p.txt"
    prompts.write_text(FILE)
    return main(
        ["demo", "--target", target, "--drafter", drafter, "--prompts", str(prompts), "--max-tokens", "4", *more]
    )


@pytest.mark.parametrize("memory", [2**60, 0])
def test_it_shows_the_text_the_table_and_the_figures(
    memory: int,
    fake_pair: FakePair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(race, "_available_bytes", lambda: memory)

    status = run(fake_pair, tmp_path)

    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert lines[0] == "one two threeone two three one "
    assert [line.split("  ")[0] for line in lines[3:7]] == ["baseline", "chain of 4", "tree of 8", "automatic budget"]
    assert lines[-2] == "outputs identical: yes"
    # a prompt of four tokens takes the fake a second alone, and half a second with a drafter
    assert json.loads(lines[-1]) == {
        "identical": True,
        "speedup": 2.0,
        "mean_acceptance_length": 3.0,
        "tokens_per_second": {"baseline": 4.0, "chain": 8.0, "tree": 8.0, "auto": 8.0},
    }


def test_json_only_prints_one_line(fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(fake_pair, tmp_path, "--json-only") == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert captured.err == ""


def test_accepted_drafts_are_coloured_if_asked_for_and_never_otherwise_off_a_terminal(
    fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(fake_pair, tmp_path, "--color", "always")

    out = capsys.readouterr().out
    assert out.startswith("\x1b[1mone two three\x1b[0mone \x1b[32mtwo \x1b[0mthree \x1b[32mone \x1b[0m")
    assert "\x1b[32mthis colour\x1b[0m: drafted and accepted" in out


def test_a_different_output_fails(fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(fake_pair, tmp_path, with_drafter={"differs_at_temperature": 0.0, "differs_at": 3})

    lines = capsys.readouterr().out.splitlines()
    assert status == 1
    assert json.loads(lines[-1])["identical"] is False
    assert [line.rsplit("  ", 1)[-1].strip() for line in lines[3:7]] == ["identical", *["DIFFERENT"] * 3]


def test_one_round_that_differs_is_enough_to_fail_and_speed_is_the_median() -> None:
    def generation(seconds: float, *token_ids: int) -> Generation:
        return Generation([Answer("", list(token_ids), 2, seconds)], seconds, {})

    same = [generation(seconds, 1, 2, 3, 4) for seconds in (1.0, 4.0, 2.0)]
    rounds = {"baseline": same, "chain": same, "tree": same, "auto": [*same[:2], generation(2.0, 1, 2, 3, 5)]}

    summary = demo.summarise(rounds)

    assert summary["identical"] is False
    assert summary["tokens_per_second"] == {"baseline": 2.0, "chain": 2.0, "tree": 2.0, "auto": 2.0}


def test_a_prompt_that_is_too_long_is_named(
    fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fake_pair, tmp_path, max_words=2) == 1
    assert "vllm-redrafter demo: prompt 1: too long" in capsys.readouterr().err


def test_a_target_without_its_drafter_is_refused(fake_pair: FakePair, capsys: pytest.CaptureFixture[str]) -> None:
    target, _ = fake_pair(log="an engine was started")

    assert main(["demo", "--target", target]) == 1
    assert "pass --target and --drafter together, or neither" in capsys.readouterr().err


def test_without_the_example_pair_it_says_where_that_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "EXAMPLES", tmp_path / "models")

    assert main(["demo"]) == 1
    assert f"no example pair at {tmp_path / 'models'}: run this in a checkout" in capsys.readouterr().err


@pytest.mark.parametrize("as_is", [False, True])
def test_the_example_pair_is_grown_unless_it_is_wanted_as_it_is(
    as_is: bool,
    fake_pair: FakePair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_pair()
    (tmp_path / "prompts.txt").write_text(FILE)
    monkeypatch.setattr(demo, "EXAMPLES", tmp_path)
    grown: list[Path] = []

    def grow(directory: Path) -> int:
        grown.append(directory)
        for name in ("target", "drafter"):
            shutil.copytree(tmp_path / name, directory / name)
        return 61_000_000

    monkeypatch.setattr(demo, "_grow", grow)

    assert main(["demo", "--max-tokens", "4", *(["--as-is"] if as_is else [])]) == 0
    out = capsys.readouterr().out
    assert ("it is grown" in out) is ("61M parameters" in out) is not as_is
    assert len(grown) == (not as_is)
    assert not any(directory.exists() for directory in grown), "what was grown is not left behind"


def test_growth_makes_a_target_of_the_size_that_is_told(tmp_path: Path) -> None:
    told = demo._grow(tmp_path)

    with safe_open(tmp_path / "target" / "model.safetensors", "pt") as tensors:
        sizes = [math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118
    assert sum(sizes) == told == pytest.approx(75e6, rel=0.05)
    assert load_drafter(tmp_path / "drafter").config.hidden_size == demo.GROWTH_FACTOR * 256


def test_only_the_example_target_can_be_wanted_as_it_is(
    fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fake_pair, tmp_path, "--as-is") == 1
    assert "leave out --as-is" in capsys.readouterr().err


def test_the_four_engines_ask_for_a_chain_a_tree_and_a_budget_of_its_own() -> None:
    specs = race.specs("t", "d", "float32")

    assert specs["baseline"].speculative_config is None
    assert {name: spec.speculative_config for name, spec in specs.items() if name != "baseline"} == {
        "chain": {
            "method": "redrafter",
            "model": "d",
            "num_speculative_tokens": 4,
            "beam_width": 1,
            "draft_length": 4,
            "budget": "fixed",
        },
        "tree": {"method": "redrafter", "model": "d", "num_speculative_tokens": 8, "budget": "fixed"},
        "auto": {"method": "redrafter", "model": "d", "num_speculative_tokens": 8, "budget": "auto"},
    }


def test_a_slow_machine_gets_one_round(
    fake_pair: FakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(race, "MAX_MEASURING_SECONDS", 0)
    turns_played: list[int] = []
    monkeypatch.setattr(race, "merge", lambda generations: turns_played.append(1) or merge(generations))

    assert run(fake_pair, tmp_path, "--json-only") == 0
    assert len(turns_played) == 4
