from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.cli.conftest import FakePair
from vllm_redrafter.bench import memory as memory_module
from vllm_redrafter.cli import demo, race
from vllm_redrafter.cli.engine import Engine, EngineSpec
from vllm_redrafter.cli.generation import Answer, Generation, Prompt
from vllm_redrafter.cli.main import main
from vllm_redrafter.cli.progress import Progress
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
    monkeypatch.setattr(memory_module, "available_bytes", lambda: memory)

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


def test_it_says_how_to_go_on_in_commands_that_can_be_typed_where_it_was_called(
    fake_pair: FakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = tmp_path / "my venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "vllm"):
        (programs / name).touch()
    monkeypatch.setattr("sys.executable", str(programs / "python"))
    monkeypatch.chdir(tmp_path)
    target, drafter = str(tmp_path / "target"), str(tmp_path / "drafter")

    assert run(fake_pair, tmp_path) == 0

    lines = [shlex.split(line) for line in capsys.readouterr().err.splitlines()]
    (serve,) = [line for line in lines if "--speculative-config" in line]
    assert serve[:4] == ["my venv/bin/vllm", "serve", target, "--speculative-config"]
    assert json.loads(serve[4]) == {"method": "redrafter", "model": drafter, "num_speculative_tokens": 8}
    assert ["vllm-redrafter", "verify", "--target", target, "--drafter", drafter] in lines


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


def rounds_of_one_prompt(*seconds: float, last_token_id: int = 4) -> race.Rounds:
    token_ids = [[1, 2, 3, 4]] * (len(seconds) - 1) + [[1, 2, 3, last_token_id]]
    return [[Generation([Answer("", ids, 2, each)], each, {})] for each, ids in zip(seconds, token_ids, strict=True)]


def test_one_round_that_differs_is_enough_to_fail_and_speed_is_the_median() -> None:
    same = rounds_of_one_prompt(1.0, 4.0, 2.0)
    rounds = {
        "baseline": same,
        "chain": same,
        "tree": same,
        "auto": rounds_of_one_prompt(1.0, 4.0, 2.0, last_token_id=5),
    }

    summary = demo.summarise(rounds)

    assert summary["identical"] is False
    assert summary["tokens_per_second"] == {"baseline": 2.0, "chain": 2.0, "tree": 2.0, "auto": 2.0}


@pytest.mark.parametrize("stalled", race.LABELS)
def test_one_stalled_measurement_moves_no_figure(
    stalled: str,
    fake_pair: FakePair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = race.specs(str(tmp_path / "target"), str(tmp_path / "drafter"), "float32")[stalled]
    num_calls = 0

    class Stalling(Engine):
        def generate(self, prompts: Sequence[Prompt], sampling: dict[str, Any], **more: Any) -> Generation:
            nonlocal num_calls
            generation = super().generate(prompts, sampling, **more)
            num_calls += self._spec == spec
            # the first call is the warm-up
            is_stalled = self._spec == spec and num_calls == 2
            return generation._replace(seconds=60.0) if is_stalled else generation

    monkeypatch.setattr(race, "Engine", Stalling)
    # as few rounds as a slow machine gets
    monkeypatch.setattr(race, "MAX_MEASURING_SECONDS", 0)

    assert run(fake_pair, tmp_path) == 0

    assert num_calls >= 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2] for line in lines[-6:-2]] == ["1.00x", "2.00x", "2.00x", "2.00x"]
    assert json.loads(lines[-1])["speedup"] == 2.0
    assert json.loads(lines[-1])["tokens_per_second"] == {"baseline": 4.0, "chain": 8.0, "tree": 8.0, "auto": 8.0}


def test_a_machine_that_slows_down_between_two_engines_spoils_one_ratio() -> None:
    # from the second measurement of the drafter on everything takes twice as long
    baseline, auto = rounds_of_one_prompt(1.0, 1.0, 2.0), rounds_of_one_prompt(0.5, 1.0, 1.0)

    assert demo.summarise({"baseline": baseline, "auto": auto})["speedup"] == 2.0


def test_a_round_without_its_counterpart_does_not_count_for_the_speedup() -> None:
    baseline, auto = rounds_of_one_prompt(1.0), rounds_of_one_prompt(0.5, 0.25, 0.25)

    assert demo.summarise({"baseline": baseline, "auto": auto})["speedup"] == 2.0


def test_engines_take_turns_at_every_prompt(fake_pair: FakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str | None, EngineSpec]] = []

    class Noting(Engine):
        def generate(self, prompts: Sequence[Prompt], *rest: Any, **more: Any) -> Generation:
            turns.append((prompts[0].text, self._spec))
            return super().generate(prompts, *rest, **more)

    monkeypatch.setattr(race, "Engine", Noting)
    monkeypatch.setattr(memory_module, "available_bytes", lambda: 2**60)
    specs = race.specs(*fake_pair(), "float32")

    race.run(
        specs,
        [Prompt("one"), Prompt("two")],
        {"temperature": 0.0, "max_tokens": 2},
        lambda *_: None,
        Progress(quiet=True),
    )

    assert turns == race.NUM_ROUNDS * [(text, spec) for text in ("one", "two") for spec in specs.values()]


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
        "auto": {"method": "redrafter", "model": "d", "num_speculative_tokens": 8},
    }


@pytest.mark.parametrize(("num_prompts", "num_rounds"), [(1, 3), (2, 2), (3, 1)])
def test_a_slow_machine_gets_no_more_rounds_than_a_median_needs(
    num_prompts: int, num_rounds: int, fake_pair: FakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "MAX_MEASURING_SECONDS", 0)
    specs = race.specs(*fake_pair(), "float32")
    prompts = [Prompt("one two")] * num_prompts

    rounds = race.run(specs, prompts, {"temperature": 0.0, "max_tokens": 2}, lambda *_: None, Progress(quiet=True))

    assert {name: [len(each) for each in own] for name, own in rounds.items()} == dict.fromkeys(
        specs, [num_prompts] * num_rounds
    )
