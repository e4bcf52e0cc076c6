"""What a training step needs beside the target's own forward: peak memory and time, for every loss."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_redrafter.training.batch import Batch
from vllm_redrafter.training.loss import TOKEN_LOSSES
from vllm_redrafter.training.recipe import Recipe, build_drafter
from vllm_redrafter.training.rollout import Objective, Rollout
from vllm_redrafter.training.target import FrozenTarget

_REPEATS = 5


class Cost(NamedTuple):
    """What one step costs."""

    name: str
    peak_bytes: int
    """Memory of the process, or allocated on the GPU, at its highest during the step, weights included."""
    chunk_bytes: int
    """The logits of one chunk, and as much again for the target's probabilities; 0 for the forward."""
    seconds: float
    """Median."""


def measure(target: FrozenTarget, recipe: Recipe, *, num_sequences: int, length: int) -> list[Cost]:
    """Return the cost of the target's forward alone, then of a training step with each loss, on random tokens."""
    device = target.device
    token_ids = torch.randint(target.vocab_size, (num_sequences, length), device=device)
    positions = torch.arange(length, device=device).expand(num_sequences, length)
    batch = Batch(token_ids, torch.ones_like(token_ids, dtype=torch.bool), positions, torch.arange(num_sequences))
    costs = [_cost("target's forward", lambda: target.read(batch), device, 0)]
    for loss in TOKEN_LOSSES:
        # every text is followed to its end: the most that a step may need
        objective = Objective(loss=loss, num_offsets=recipe.objective.num_offsets, reach=0)
        drafter = build_drafter(target, recipe, None, "bench").to(device)
        if recipe.tie_lm_head:
            drafter.tie_head(target.head_weight)
        rollout = Rollout(drafter, target, objective).to(device)
        num_targets = rollout.num_targets(batch)

        def step(rollout: Rollout = rollout, num_targets: torch.Tensor = num_targets) -> None:
            rollout(batch, num_targets).loss.backward()
            rollout.zero_grad(set_to_none=True)

        num_positions = objective.positions_per_chunk(drafter.config.head_size)
        chunk_bytes = 4 * num_positions * (objective.num_offsets * drafter.config.head_size + target.vocab_size)
        costs.append(_cost(f"step, {loss}", step, device, chunk_bytes))
    return costs


def _cost(name: str, work: Callable[[], object], device: torch.device, chunk_bytes: int) -> Cost:
    # the first time, libraries prepare what they keep
    work()
    seconds = []
    gc.collect()
    _forget_peak(device)
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return Cost(name, _peak(device), chunk_bytes, statistics.median(seconds))


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # Linux: the high-water mark of the process falls to what it holds now
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
