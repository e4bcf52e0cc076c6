"""What a training step costs is measured beside the target's own forward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.tiny_models import make_llama, save_target
from tests.training.small import VOCAB, make_target
from vllm_redrafter.bench.training import measure
from vllm_redrafter.cli.main import main
from vllm_redrafter.training.recipe import Recipe


def test_every_loss_is_measured_with_the_logits_of_its_chunk() -> None:
    forward, *steps = measure(make_target(), Recipe(exit_dim=8), num_sequences=2, length=20)

    assert [step.name for step in steps] == ["step, ce", "step, kl", "step, lk"]
    assert forward.chunk_bytes == 0
    # six offsets of as many positions as suit so small a head, and the target's own for each position
    assert {step.chunk_bytes for step in steps} == {4 * 1024 * (6 * VOCAB + VOCAB)}
    for cost in (forward, *steps):
        assert cost.peak_bytes > 0
        assert cost.seconds > 0


def test_the_command_ends_with_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = save_target(make_llama(), tmp_path)

    assert main(["bench", "training", "--target", target, "--batch-size", "1", "--length", "32"]) == 0

    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:2] == ["peak", "MiB"]
    told = json.loads(out[-1])
    assert set(told["of_forward_and_chunk"]) == {"step, ce", "step, kl", "step, lk"}
    assert told["provenance"]["versions"]["torch"]
