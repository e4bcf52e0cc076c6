from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.cli.conftest import SIZES, FakePair
from vllm_redrafter.bench import memory
from vllm_redrafter.cli.main import main
from vllm_redrafter.core.checkpoint import save_drafter
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

STATS = {
    "num_steps": 4,
    "num_emitted_tokens": 10,
    "num_draft_tokens": 32,
    "num_engine_steps": 5,
    "draft_seconds": 0.05,
}


def run_speed(fake_pair: FakePair, tmp_path: Path, *more: str, **behaviour: object) -> int:
    target, drafter = fake_pair(**behaviour)
    prompts = tmp_path / "p.txt"
    prompts.write_text("one two three\nfour\n")
    command = ["bench", "speed", "--target", target, "--drafter", drafter, "--prompts", str(prompts)]
    return main([*command, "--max-tokens", "5", "--batch-sizes", "1", *more])


@pytest.mark.parametrize("available", [2**60, 0])
def test_speed_prints_a_table_and_one_line_of_json(
    available: int,
    fake_pair: FakePair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: available)

    status = run_speed(fake_pair, tmp_path, "--configs", "plain,tree8", "--temperature", "0", "--rounds", "2")

    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert status == 0
    header = ["batch", "T", "tokens/s", "x", "plain", "95%", "in", "tokens/step", "nodes/step", "output"]
    assert lines[0].split() == header
    # 8 prompts of 5 tokens take the fake a second alone, and half a second with a drafter
    assert lines[1].split() == ["plain", "1", "0", "40.0", "1.00x", "–", "1.00", "–", "identical"]
    assert lines[2].split() == ["tree8", "1", "0", "80.0", "2.00x", "–", "2.00", "–", "identical"]
    assert json.loads(lines[-1])["identical"] is True
    assert json.loads(lines[-1])["results"][1] == {
        "config": "tree8",
        "batch_size": 1,
        "temperature": 0.0,
        "tokens_per_second": 80.0,
        "speedup": 2.0,
        "speedup_range": None,
        "tokens_per_step": 2.0,
        "nodes_per_step": None,
        "identical": True,
    }
    assert ("one engine after another" in captured.err) == (available == 0)


def test_speed_says_where_the_time_of_a_step_goes(
    fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_speed(fake_pair, tmp_path, "--configs", "plain,tree8", "--temperature", "0", "--rounds", "1", stats=STATS)

    lines = capsys.readouterr().out.splitlines()
    assert lines[4].split() == ["ms", "per", "step", "batch", "T", "total", "draft", "rest"]
    # plain: 8 prompts of 5 tokens take 40 steps and a second
    assert lines[5].split() == ["plain", "1", "0", "25.00", "–", "25.00"]
    assert lines[6].split() == ["tree8", "1", "0", "100.00", "10.00", "90.00"]


def test_speed_says_from_six_rounds_on_how_sure_a_speed_up_is(
    fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_speed(fake_pair, tmp_path, "--configs", "plain,tree8", "--temperature", "0", "--rounds", "6")

    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[3:6] == ["40.0", "1.00x", "–"]
    assert lines[2].split()[3:6] == ["80.0", "2.00x", "2.00–2.00"]
    assert json.loads(lines[-1])["results"][1]["speedup_range"] == [2.0, 2.0]


@pytest.mark.parametrize("has_gpu", [False, True])
def test_speed_asks_for_an_automatic_budget_and_on_a_gpu_for_larger_trees(
    has_gpu: bool,
    fake_pair: FakePair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(memory, "has_gpu", lambda: has_gpu)

    assert run_speed(fake_pair, tmp_path, "--temperature", "0", "--rounds", "1") == 0

    configs = {result["config"] for result in json.loads(capsys.readouterr().out.splitlines()[-1])["results"]}
    assert {"plain", "auto", "tree16" if has_gpu else "tree2"} <= configs


def test_speed_writes_what_it_measured_and_what_with(fake_pair: FakePair, tmp_path: Path) -> None:
    output = tmp_path / "speed.json"

    run_speed(fake_pair, tmp_path, "--configs", "plain,auto", "--rounds", "2", "--output", str(output), stats=STATS)

    measured = json.loads(output.read_text())
    assert measured["versions"]["torch"] == torch.__version__
    assert measured["num_cpus"] >= 1
    assert [(result["config"], result["temperature"]) for result in measured["results"]] == [
        ("plain", 0.0),
        ("auto", 0.0),
        ("plain", 1.0),
        ("auto", 1.0),
    ]
    assert measured["results"][1]["rounds"] == [80.0, 80.0]
    assert measured["results"][1]["mean_acceptance_length"] == 2.5
    assert measured["results"][1]["nodes_per_step"] == 8.0


@pytest.mark.parametrize(("dtype", "status"), [("float32", 1), ("bfloat16", 0)])
def test_speed_fails_where_a_drafter_changes_the_output_in_float32(
    dtype: str,
    status: int,
    fake_pair: FakePair,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    differing = {"with_drafter": {"differs_at_temperature": 1.0, "differs_at": 3}}

    found = run_speed(
        fake_pair, tmp_path, "--configs", "plain,tree8", "--temperature", "1", "--dtype", dtype, **differing
    )

    lines = capsys.readouterr().out.splitlines()
    assert found == status
    assert [line.rsplit("  ", 1)[-1].strip() for line in lines[1:3]] == ["identical", "24 of 24 differ"]
    assert json.loads(lines[-1])["identical"] is False


def test_speed_does_not_hold_the_drafter_to_account_for_what_ngram_samples(fake_pair: FakePair, tmp_path: Path) -> None:
    differing = {"with_drafter": {"differs_at_temperature": 1.0, "differs_at": 3}}

    assert run_speed(fake_pair, tmp_path, "--configs", "plain,ngram", "--rounds", "1", **differing) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "plain,tree"], "--configs: there is no configuration 'tree': use plain, ngram, ngramN, chainN"),
        (["--configs", "plain,tree64"], "--configs: num_speculative_tokens is 64, but it must lie between 1 and 63"),
        (["--configs", "tree8"], "--configs: 'plain' is missing, which the others are compared with: add it"),
        (["--output", "nowhere/speed.json"], "--output: no directory 'nowhere': create it first"),
    ],
)
def test_speed_refuses_what_it_cannot_measure(
    arguments: list[str], message: str, fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_speed(fake_pair, tmp_path, *arguments) == 1
    assert f"vllm-redrafter bench: {message}" in capsys.readouterr().err


def test_speed_says_which_prompt_cannot_be_run(
    fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_speed(fake_pair, tmp_path, "--configs", "plain,tree8", max_words=2) == 1
    assert "prompt 1: too long" in capsys.readouterr().err


@pytest.mark.parametrize("values", ["", "1,,2", "1,x", "0"])
def test_a_list_with_a_bad_value_is_a_wrong_usage(
    values: str, fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_speed(fake_pair, tmp_path, "--batch-sizes", values)
    assert "is no integer of at least 1" in capsys.readouterr().err


def steps_command(target: str, drafter: str, *more: str) -> list[str]:
    command = ["bench", "steps", "--target", target, "--drafter", drafter, "--batch-sizes", "1", "--rounds", "1"]
    return [*command, "--configs", "plain,tree8", "--max-tokens", "5", *more]


def give_tokenizer(target: str) -> None:
    config = LlamaConfig(**SIZES, num_attention_heads=2, max_position_embeddings=32)
    config.save_pretrained(target)
    words = WordLevel({"<unk>": 0, "one": 1, "two": 2, "three": 3}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(target)


def test_steps_prints_what_a_step_costs(
    fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, drafter = fake_pair(seconds_per_token=0.002, with_drafter={"seconds_per_token": 0.0015, "stats": STATS})
    give_tokenizer(target)
    (tmp_path / "t.txt").write_text("one two three")

    status = main(steps_command(target, drafter, "--contexts", "4,8", "--text", str(tmp_path / "t.txt")))

    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    columns = ["batch", "context", "ms/step", "x", "plain", "tokens/step"]
    assert lines[0].split() == columns
    assert lines[1].split() == ["plain", "1", "4", "2.00", "1.00x", "1.00"]
    assert lines[4].split() == [*columns, "draft"]
    # four tokens after the first, two in a step: 6 ms for two steps
    assert lines[5].split() == ["tree8", "1", "4", "3.00", "1.50x", "2.00", "25.00"]
    told = json.loads(lines[-1])
    assert [cost["context"] for cost in told["costs"]] == [4, 8, 4, 8]
    assert told["num_speculative_tokens_per_batch_size"] == [[1, 1, 8]]
    assert '"num_speculative_tokens_per_batch_size": [[1, 1, 8]]' in lines[-3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--contexts", "30"), "--contexts: prompt and answer have 35 tokens at most, but the target has 32 positions"),
        (("--max-tokens", "1"), "--max-tokens is 1, but an answer's first token comes with its prompt"),
        (("--configs", "tree8"), "the configurations tree8 lack 'plain', which they are compared with: add it"),
        (("--configs", "plain,bush"), "there is no configuration 'bush'"),
    ],
)
def test_steps_refuses_what_it_cannot_measure(
    more: tuple[str, ...], message: str, fake_pair: FakePair, capsys: pytest.CaptureFixture[str]
) -> None:
    target, drafter = fake_pair()
    give_tokenizer(target)

    assert main(steps_command(target, drafter, "--contexts", "4", *more)) == 1
    assert message in capsys.readouterr().err


def test_grow_writes_a_pair_and_says_how_large_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "target")
    save_drafter(ReDrafter(ReDrafterConfig(hidden_size=8, vocab_size=16)), tmp_path / "drafter")
    paths = [f"--{name}={tmp_path / name}" for name in ("target", "drafter", "output")]

    status = main(
        ["bench", "grow", *paths, "--factor", "2", "--layers", "3", "--head-size", "16", "--positions", "4096"]
    )

    grown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0
    assert grown["target"] == str(tmp_path / "output" / "target")
    grown_config = LlamaConfig.from_pretrained(grown["target"])
    assert (grown_config.hidden_size, grown_config.num_hidden_layers) == (16, 3)
    assert (grown_config.head_dim, grown_config.max_position_embeddings) == (16, 4096)
    grown_model = LlamaForCausalLM.from_pretrained(grown["target"])
    assert grown["target_parameters"] == sum(parameter.numel() for parameter in grown_model.parameters())
    assert json.loads((tmp_path / "output" / "drafter" / "config.json").read_text())["hidden_size"] == 16


def test_grow_refuses_a_directory_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "grow", "--target", str(tmp_path), "--output", str(tmp_path / "output")]) == 1
    assert "vllm-redrafter bench: no config.json in" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["speed", "steps", "grow"])
def test_help_of_a_bench_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom vllm_redrafter.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print({'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules), file=sys.stderr)\n"
    )

    result = subprocess.run([sys.executable, "-c", code, "bench", command, "--help"], capture_output=True, text=True)

    assert (result.returncode, result.stderr.strip()) == (0, "set()")
