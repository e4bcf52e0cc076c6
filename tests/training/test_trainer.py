"""The Trainer of transformers with our loss: what is summed, saved, resumed and refused."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from tests.training.small import HIDDEN, make_documents, make_drafter, make_target
from vllm_redrafter.core import checkpoint
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.training.evaluation import HeldOut, hold_out
from vllm_redrafter.training.packing import pack
from vllm_redrafter.training.recipe import Recipe, training_arguments
from vllm_redrafter.training.rollout import Objective, Rollout
from vllm_redrafter.training.trainer import ReDrafterTrainer, latest_checkpoint
from vllm_redrafter.training.transcripts import Transcript

ROOT = Path(__file__).resolve().parents[2]
SEQUENCES = pack(make_documents(*[12, 9, 16, 7] * 8), 16)


def make_arguments(output: Path, **changes: Any) -> TrainingArguments:
    fields = {
        "max_steps": 8,
        "batch_size": 4,
        "num_evaluations": 4,
        "bf16": False,
        "learning_rate": 1e-2,
        "warmup": 0.0,
    }
    return training_arguments(settled(**(fields | changes)), output, evaluates=False)


def settled(**fields: Any) -> Recipe:
    return Recipe(**fields).settled(hidden_size=HIDDEN, num_tokens=100)


def make_trainer(
    drafter: ReDrafter,
    arguments: TrainingArguments,
    held_out: HeldOut | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> ReDrafterTrainer:
    rollout = Rollout(drafter, make_target(), Objective(num_offsets=3, reach=0, chunk_size=32))
    return ReDrafterTrainer(rollout, arguments, SEQUENCES, held_out, callbacks)


def weights(drafter: ReDrafter) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in drafter.parameters()]


class StopAt(TrainerCallback):
    """Ends a training as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class Logged(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs or {}))


def test_training_lowers_the_loss_and_tells_it_by_offset(tmp_path: Path) -> None:
    logged = Logged()
    trainer = make_trainer(make_drafter(), make_arguments(tmp_path, max_steps=30), callbacks=[logged])

    trainer.train()

    told = [logs for logs in logged.logs if "loss" in logs]
    assert told[-1]["loss"] < 0.8 * told[0]["loss"]
    for logs in told:
        offsets = [logs[f"loss_offset_{offset}"] for offset in (1, 2, 3)]
        # both are means since the last time, once over the steps and once over the targets
        assert sum(offsets) == pytest.approx(logs["loss"], rel=0.05)
        assert all(0 <= logs[f"top1_offset_{offset}"] <= 1 for offset in (1, 2, 3))


def test_a_step_in_two_halves_is_the_step_in_one(tmp_path: Path) -> None:
    whole, halves = make_drafter(), make_drafter()

    make_trainer(whole, make_arguments(tmp_path / "whole")).train()
    make_trainer(halves, make_arguments(tmp_path / "halves", batch_size=2, gradient_accumulation=2)).train()

    for found, expected in zip(weights(halves), weights(whole), strict=True):
        # adam divides by the gradient's own size: where that is near zero, rounding is not small
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    straight, resumed = make_drafter(), make_drafter()
    objective_changes: dict[str, Any] = {"max_steps": 7, "batch_size": 3}
    make_trainer(straight, make_arguments(tmp_path / "straight", **objective_changes)).train()
    arguments = make_arguments(tmp_path / "stopped", **objective_changes)
    make_trainer(make_drafter(), arguments, callbacks=[StopAt(3)]).train()
    last = latest_checkpoint(tmp_path / "stopped")

    assert last is not None
    assert last.name == "checkpoint-3"
    make_trainer(resumed, arguments).train(resume_from_checkpoint=str(last))

    for found, expected in zip(weights(resumed), weights(straight), strict=True):
        assert torch.equal(found, expected)


def test_a_checkpoint_is_a_drafter_that_serves_and_nothing_of_the_target(tmp_path: Path) -> None:
    drafter = make_drafter(draft_vocab_size=25)

    make_trainer(drafter, make_arguments(tmp_path)).train()

    last = latest_checkpoint(tmp_path)
    assert last is not None
    loaded = checkpoint.load_drafter(last)
    for found, expected in zip(weights(loaded), weights(drafter), strict=True):
        assert torch.equal(found, expected)
    size = (last / "model.safetensors").stat().st_size
    assert size < 1.5 * sum(4 * parameter.numel() for parameter in drafter.parameters())


def test_a_checkpoint_that_was_not_written_to_its_end_is_not_the_last(tmp_path: Path) -> None:
    make_trainer(make_drafter(), make_arguments(tmp_path)).train()
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "model.safetensors").write_bytes(b"half")

    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-8"


def test_a_full_disk_ends_the_training_in_one_sentence_and_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save_drafter

    def fill_up(drafter: ReDrafter, directory: Path, dtype: torch.dtype | None = None) -> None:
        if directory.name == "checkpoint-4":
            (directory / "half").parent.mkdir(exist_ok=True)
            (directory / "half").write_text("")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(drafter, directory, dtype)

    monkeypatch.setattr(checkpoint, "save_drafter", fill_up)

    with pytest.raises(ValueError, match=r"step 4 could not be written .*No space left.*--resume.*checkpoint-2"):
        make_trainer(make_drafter(), make_arguments(tmp_path)).train()

    assert not (tmp_path / "checkpoint-4").exists()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_loss_that_is_not_a_number_stops_the_training_before_it_spoils_the_weights(tmp_path: Path) -> None:
    drafter = make_drafter()
    trainer = make_trainer(drafter, make_arguments(tmp_path))
    compute, seen = trainer.rollout.forward, []

    def fail_at_the_third(*arguments: Any) -> Any:
        report = compute(*arguments)
        seen.append(weights(drafter))
        return report._replace(loss=report.loss * float("nan")) if len(seen) == 3 else report

    trainer.rollout.forward = fail_at_the_third  # type: ignore[method-assign]

    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
        trainer.train()

    assert all(torch.equal(now, before) for now, before in zip(weights(drafter), seen[-1], strict=True))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_the_drafter_with_the_longest_acceptance_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = make_target(), make_drafter()
    held_out = hold_out(target, [Transcript(make_documents(20)[0].token_ids, 4, "test")])
    recipe = settled(max_steps=8, batch_size=4, num_evaluations=4, bf16=False, learning_rate=1e-2)
    rollout = Rollout(drafter, target, Objective(num_offsets=3))
    trainer = ReDrafterTrainer(rollout, training_arguments(recipe, tmp_path, evaluates=True), SEQUENCES, held_out)
    lengths, states = iter([1.2, 1.9, 1.4, 1.3]), []
    monkeypatch.setattr(
        "vllm_redrafter.training.trainer.acceptance",
        lambda *_, **__: [states.append(weights(drafter)) or Scored(next(lengths))],
    )

    trainer.train()

    assert trainer.state.best_metric == 1.9
    assert all(torch.equal(now, best) for now, best in zip(weights(drafter), states[1], strict=True))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}


class Scored:
    def __init__(self, length: float) -> None:
        self.mean_acceptance_length = length


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    drafter = make_drafter()
    make_trainer(drafter, make_arguments(tmp_path / "one", max_steps=4)).train()

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    program = [*launch, "tests.training.two_processes", str(tmp_path / "two")]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stderr[-2000:]
    trained = checkpoint.load_drafter(tmp_path / "two" / "checkpoint-4")
    for found, expected in zip(weights(trained), weights(drafter), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
