"""What the walks did, counted on the device; only who asks waits for it."""

from __future__ import annotations

from typing import Any

import torch

from vllm_redrafter import kernels
from vllm_redrafter.kernels.batch import COUNTED


class WalkCounts:
    """Sums over all verifications since the engine started, under the names of `adapter.stats.Stats`."""

    def __init__(self, num_nodes: int, device: torch.device) -> None:
        self._sums = torch.zeros(len(COUNTED) + num_nodes, dtype=torch.int64, device=device)

    def add(
        self,
        nodes: torch.Tensor,  # [num_reqs, 1 + N]: the walks, -1 behind their ends
        parents: torch.Tensor,  # [max_num_reqs, 1 + N]: by slot, -1 at roots and in padding
        slots: torch.Tensor,  # [num_reqs]
        cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    ) -> None:
        """Count the verifications of one step, without waiting for the device."""
        kernels.backend().count_walks(nodes, parents, slots, cu_num_logits, self._sums)

    def describe(self) -> dict[str, Any]:
        """Return the sums; waits for the device."""
        sums = self._sums.tolist()
        counts: dict[str, Any] = dict(zip(COUNTED, sums[: len(COUNTED)], strict=True))
        by_depth = sums[len(COUNTED) :]
        while by_depth and not by_depth[-1]:
            by_depth.pop()
        accepted = sum(by_depth)
        # left out are the steps of decoding for whose drafts the scheduler had no room
        return {
            "num_steps": counts["num_drafts"],
            "num_emitted_tokens": counts["num_drafts"] + accepted,
            **counts,
            "num_accepted_tokens": accepted,
            "accepted_by_depth": by_depth,
            "budgets": {},
        }
