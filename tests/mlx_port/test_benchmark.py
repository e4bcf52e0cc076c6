from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_port import benchmark, surface
from tests.mlx_port.tiny_models import CONFIGS, make_model
from tests.mlx_port.twins import EXAMPLE

PAIR = ["--model", str(EXAMPLE / "target"), "--drafter", str(EXAMPLE / "drafter")]
APPLES_AUTOREGRESSION = "run,dtype,comprehension_mlx,generation_mlx,comprehension_ours,generation_ours"
APPLES_DRAFTING = (
    "run,beam_width,beam_length,dtype,nmax_length,greedy,steps,prompt_length,"
    "prompt_and_generated_length,comprehension_and_generation_time"
)


def test_a_sweep_writes_apples_columns_and_draws_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the figures need the extra 'bench'")
    arguments = ["--output", str(tmp_path), "--dtypes", "q4", "--widths", "1", "2", "--lengths", "2", "3"]

    status = benchmark.main([*PAIR, *arguments, "--max-tokens", "4", "--runs", "1"])

    assert status == 0
    alone = (tmp_path / "autoregression.csv").read_text().splitlines()
    assert alone[0].startswith(APPLES_AUTOREGRESSION)
    # greedy and sampled
    assert len(alone) == 1 + 2
    drafted = (tmp_path / "recurrent_drafting.csv").read_text().splitlines()
    assert drafted[0].startswith(APPLES_DRAFTING)
    rows = list(csv.DictReader(drafted))
    cells = [(row["dtype"], row["greedy"], row["beam_width"], row["beam_length"]) for row in rows]
    assert len(set(cells)) == len(cells) == 2 * 4
    assert all(int(row["prompt_and_generated_length"]) == int(row["prompt_length"]) + 4 for row in rows)
    assert (tmp_path / "speedup.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["best"]["speedup"] == max(float(row["speedup"]) for row in rows)
    assert {"mlx", "mlx_lm", "device", "command"} <= set(summary)


def test_a_sweep_is_apples_unless_told_otherwise() -> None:
    arguments = benchmark._make_parser().parse_args([*PAIR, "--output", "o"])

    assert (arguments.widths, arguments.lengths) == ([1, 2, 3, 4], [2, 3, 4, 5])
    assert (arguments.dtypes, arguments.max_tokens) == (["fp16", "bf16", "q4"], 200)


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", mx.float16), ("bf16", mx.bfloat16), ("q4", mx.bfloat16)])
def test_a_pair_is_loaded_in_the_type_asked_for(dtype: str, expected: mx.Dtype) -> None:
    target, _, drafter = benchmark.load_as(str(EXAMPLE / "target"), str(EXAMPLE / "drafter"), dtype)

    assert target.dtype == expected
    is_quantised = [any(hasattr(part, "bits") for part in whole.modules()) for whole in (target.model, drafter)]
    assert is_quantised == [dtype == "q4"] * 2


def test_a_quantised_target_has_no_other_type(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIGS["llama"], bits=4)
    monkeypatch.setattr(benchmark.mlx_lm, "load", lambda _: (model, None))

    with pytest.raises(ValueError, match="'m' is quantised, so it cannot run as fp16: pass `--dtypes q4`"):
        benchmark.load_as("m", "d", "fp16")


def test_a_cell_is_the_mean_of_its_runs() -> None:
    rows = [
        {"beam_width": width, "beam_length": length, "speedup": speedup}
        for width, length, speedup in ((1, 2, 1.0), (1, 2, 2.0), (2, 3, 0.5))
    ]

    cells = surface.grid(rows, [1, 2], [2, 3])

    assert (cells[0][0], cells[1][1]) == (1.5, 0.5)
    assert math.isnan(cells[0][1])


def test_a_beam_length_without_a_draft_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([*PAIR, "--output", str(tmp_path), "--lengths", "1"]) == 1
    assert "a beam length is 1, but it counts the init token: it must be 2 or more" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value", "least"), [("--runs", 0, 1), ("--max-tokens", 1, 2), ("--widths", 0, 1)])
def test_a_sweep_of_nothing_is_refused(
    flag: str, value: int, least: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main([*PAIR, "--output", str(tmp_path), flag, str(value)]) == 1
    assert f"{flag} is {value}, but it must be {least} or more" in capsys.readouterr().err
