"""`transformers.Trainer` for drafters: its loop, data parallelism and checkpoints; ours are loss, measure and file.

What is overridden, and why:

    compute_loss                 the rollout's loss, normalised over all targets of an optimiser's step
    _get_num_items_in_batch      those targets are counted per offset
    evaluate                     what counts is acceptance length, simulated on texts of the target
    log                          loss and accuracy of every offset stand beside the loss
    _save_checkpoint             half a checkpoint, where the disk is full, is removed
    _save, _load_from_checkpoint, _load_best_model
                                 a checkpoint is a drafter's directory that serves as it is; the target is not in it
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vllm_redrafter.core import checkpoint
from vllm_redrafter.core.beam_search import BeamShape
from vllm_redrafter.training.batch import Batch, collate
from vllm_redrafter.training.evaluation import HeldOut, acceptance
from vllm_redrafter.training.packing import PackedSequence
from vllm_redrafter.training.rollout import TOP_K, Rollout


class ReDrafterTrainer(Trainer):
    """Trains a rollout's drafter on packed sequences and measures it on held-out texts of its target."""

    # compute_loss divides by the targets of the whole step, whatever the number of batches it is split into
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        rollout: Rollout,
        args: TrainingArguments,
        sequences: Sequence[PackedSequence],
        held_out: HeldOut | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(
            model=rollout,
            args=args,
            data_collator=collate,
            train_dataset=list(sequences),
            eval_dataset=held_out.writings if held_out else None,
            callbacks=callbacks,
        )
        self.rollout = rollout
        self.held_out = held_out
        self._forget_reports()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the loss of one batch as its share in that of the optimiser's step.

        Raises:
            FloatingPointError: it is NaN or infinite.
        """
        progress = self.state.global_step / max(1, self.state.max_steps)
        report = model(Batch(**inputs), num_items_in_batch, progress)
        # waits for the device, as the Trainer itself does before the next step
        loss_value = float(report.loss.detach())
        if not math.isfinite(loss_value):
            raise FloatingPointError(
                f"the loss is {loss_value} at step {self.state.global_step + 1}, and nothing of that step was "
                "kept: resume from the last checkpoint with a lower --learning-rate, or look at the data of that step"
            )
        self._loss_sums += report.loss_sums.cpu()
        self._num_correct += report.num_correct.cpu()
        self._num_reached += report.num_reached.cpu()
        # gradients are averaged over processes, while every process divided by the targets of all
        loss = report.loss * self.args.world_size
        return (loss, report) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """Return the targets of all batches of one step, on all processes, per offset."""
        counts = [self.rollout.num_targets(Batch(**self._prepare_inputs(batch))) for batch in batch_samples]
        total = torch.stack(counts).sum(dim=0).to(device)
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total)
        return total

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return `<prefix>_acceptance_length` with the drafter's own beams and number of nodes."""
        if self.held_out is None:
            raise ValueError("there is nothing to evaluate on: pass held-out texts of the target")
        drafter = self.rollout.drafter.eval()
        config = drafter.config
        shape = BeamShape(config.beam_width, config.draft_length)
        found = acceptance(drafter, self.held_out, shape, [config.num_speculative_tokens], temperature=0)
        metrics = {f"{metric_key_prefix}_acceptance_length": found[0].mean_acceptance_length}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and where a training loss is told, each offset's loss and accuracy where it was reached since then."""
        if "loss" in logs:
            sums = torch.cat((self._loss_sums[:, None], self._num_correct, self._num_reached[:, None]), dim=1)
            sums = self.accelerator.reduce(sums.to(self.args.device)).cpu()
            means = sums[:, :-1] / sums[:, -1:].clamp(min=1)
            for offset, (loss, *accuracies) in enumerate(means.tolist(), 1):
                logs[f"loss_offset_{offset}"] = loss
                logs[f"top1_offset_{offset}"] = accuracies[0]
            self._forget_reports()
        super().log(logs, start_time)

    @property
    def _output(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    def _forget_reports(self) -> None:
        num_offsets = self.rollout.objective.num_offsets
        self._loss_sums = torch.zeros(num_offsets)
        self._num_correct = torch.zeros(num_offsets, TOP_K)
        self._num_reached = torch.zeros(num_offsets)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        checkpoint.save_drafter(self.rollout.drafter, Path(output_dir) if output_dir else self._output)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_drafter(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_drafter(Path(self.state.best_model_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = self._output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch and safetensors say a full disk in errors of their own; half a checkpoint must not be resumed from
            shutil.rmtree(directory, ignore_errors=True)
            kept = latest_checkpoint(directory.parent)
            raise ValueError(
                f"the checkpoint of step {self.state.global_step} could not be written ({error}): make room and go on "
                f"with --resume; the last good one is {str(kept) if kept else 'none'}"
            ) from error

    def _load_drafter(self, directory: Path) -> None:
        self.rollout.drafter.load_state_dict(checkpoint.load_drafter(directory).state_dict())


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the last checkpoint that was written to its end, or None."""
    # the state is what a checkpoint is closed with: without it the process was killed before
    complete = [path.parent for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
