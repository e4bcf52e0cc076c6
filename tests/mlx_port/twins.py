"""The same drafter twice, in torch and in MLX, through a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import torch

from mlx_port.checkpoint import load_drafter
from mlx_port.drafter import ReDrafter
from vllm_redrafter.core import checkpoint
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter as TorchReDrafter

EXAMPLE = Path(__file__).parents[2] / "examples" / "models"
HIDDEN = 32
VOCAB = 97
VARIANTS: dict[str, dict[str, Any]] = {
    "rnn": {},
    "no rnn": {"rnn": False},
    "input projection": {"exit_dim": 48},
    "input projection, no rnn": {"exit_dim": 48, "rnn": False},
    "no blocks": {"num_draft_layers": 0},
    "draft vocabulary": {"draft_vocab_size": 60},
    "top 50": {"top_k": 50},
    "top 10, no rnn": {"top_k": 10, "rnn": False},
}


class Twins(NamedTuple):
    """Two drafters with one set of weights, and one table of embeddings."""

    torch: TorchReDrafter
    mlx: ReDrafter
    table: np.ndarray  # [vocab_size, hidden_size]

    def torch_embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.table)[token_ids]

    def mlx_embed(self, token_ids: mx.array) -> mx.array:
        return mx.array(self.table)[token_ids]


def save_random(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random drafter and return where."""
    torch.manual_seed(seed)
    drafter = TorchReDrafter(ReDrafterConfig(**{"hidden_size": HIDDEN, "vocab_size": VOCAB, **changes}))
    if drafter.config.draft_vocab_size is not None:
        drafter.set_draft_vocabulary(torch.randperm(VOCAB)[: drafter.config.draft_vocab_size].sort().values)
    for parameter in drafter.parameters():
        # scores far apart: no order of candidates hangs on float32's last digit
        torch.nn.init.normal_(parameter, std=0.4)
    checkpoint.save_drafter(drafter, directory)
    return directory


def load_twins(directory: Path) -> Twins:
    drafter = checkpoint.load_drafter(directory)
    table = np.random.default_rng(1).normal(size=(drafter.config.vocab_size, drafter.config.hidden_size))
    return Twins(drafter, load_drafter(directory, dtype=mx.float32), table.astype(np.float32))


def to_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.tolist(), dtype=np.float64 if array.dtype == mx.float32 else np.int64)
