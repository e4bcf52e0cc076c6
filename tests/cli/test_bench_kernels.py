from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from vllm_redrafter.bench.measurement import Measurement, share_that_differs
from vllm_redrafter.cli import bench_kernels
from vllm_redrafter.cli.main import main

kernel_binaries = pytest.importorskip("vllm_redrafter.bench.kernel_binaries", exc_type=ImportError)


def run_without_vllm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process that has no vLLM; Triton is imported there as the command wants it."""
    program = "import sys; sys.modules['vllm'] = None; from vllm_redrafter.cli.main import main; sys.exit(main())"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, "bench", "kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would be timed")
def test_without_a_gpu_the_kernels_are_interpreted_and_agree() -> None:
    result = run_without_vllm()

    assert result.returncode == 0, result.stderr
    assert "there is no GPU here" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["kernel", "case", "error", "at", "most"]
    found = json.loads(lines[-1])
    assert found["agree"] is True
    assert found["gpu"] is None
    assert {one["kernel"] for one in found["results"]} == {
        "tree_attention",
        "commit_kv",
        "verify_walk",
        "target_tokens",
        "sampling_noise",
        "silu_of_sum",
        "plus_silu",
        "best_continuations",
        "draft_trees",
        "tree_positions",
        "count_walks",
        "draft_starts",
        "store_trees",
    }
    assert all(line.endswith("ok") for line in lines[1:-1])


def test_a_kernel_that_is_wrong_or_wrote_nothing_is_said_to_be() -> None:
    right, wrong, unwritten = (Measurement("k", "c", error, 1e-3) for error in (1e-4, 1e-2, float("nan")))

    assert [one.agrees for one in (right, wrong, unwritten)] == [True, False, False]
    assert [line.split()[-1] for line in bench_kernels.render([right, wrong, unwritten]).splitlines()[1:]] == [
        "ok",
        "WRONG",
        "WRONG",
    ]


def test_of_several_outputs_the_worst_counts() -> None:
    ours, twin = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])

    assert share_that_differs((ours, ours), (ours, ours)) == 0
    assert share_that_differs((ours, ours, ours), (ours, twin, ours)) == 0.25


def test_times_are_held_against_floor_and_stock() -> None:
    timed = Measurement("tree_attention", "batch 1", 1e-4, 1e-3, ms=0.5, floor_ms=0.4, stock_ms=0.25)
    without_floor = Measurement("verify_walk", "batch 1", 0, 0, ms=0.01)

    lines = bench_kernels.render_times([timed, without_floor]).splitlines()

    assert lines[1].split()[-6:] == ["1.0e-04", "0.5000", "0.4000", "80%", "0.2500", "2.00x"]
    assert lines[2].split()[-5:] == ["0.0100", "–", "–", "–", "–"]


@pytest.mark.parametrize(
    ("shared_bytes", "spilled_bytes", "status"), [(98560, 0, 0), (98560, 8, 1), (170_000, 0, 1)], ids=str
)
def test_spills_and_too_much_shared_memory_fail_the_command(
    shared_bytes: int,
    spilled_bytes: int,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    binary = kernel_binaries.Binary(168, shared_bytes, spilled_bytes, loads_ahead=6)
    one = kernel_binaries.Compiled("attend", "17 rows", 90, binary)
    monkeypatch.setattr(kernel_binaries, "compile_all", lambda capability: [one._replace(capability=capability)])

    assert main(["bench", "kernels", "--compile-only", "80,90"]) == status

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-5:] for line in lines[1:-1]] == [
        ["sm_80", "168", str(shared_bytes), str(spilled_bytes), "6"],
        ["sm_90", "168", str(shared_bytes), str(spilled_bytes), "6"],
    ]
    found = json.loads(lines[-1])
    assert found["spills"] is (spilled_bytes > 0)
    # an A100's program has less than an H100's
    assert found["fits"] is (shared_bytes < 163 * 1024)


def test_a_gpu_that_no_kernel_was_made_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "kernels", "--compile-only", "90,70"])

    assert "'70' is none of 80, 86, 89, 90" in capsys.readouterr().err


def test_triton_is_asked_for_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_kernels, "find_spec", lambda name: None)

    assert main(["bench", "kernels"]) == 1

    assert "pip install triton" in capsys.readouterr().err


def test_interpreted_kernels_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    assert main(["bench", "kernels", "--compile-only"]) == 1

    assert "unset it" in capsys.readouterr().err
