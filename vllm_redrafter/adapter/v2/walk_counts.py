"""What the walks did, counted on the device; only who asks waits for it."""

from __future__ import annotations

from typing import Any

import torch

_COUNTED = (
    "num_drafts",
    "num_draft_tokens",
    "num_branching_trees",
    "num_truncated_trees",
    "num_branch_acceptances",
    "num_commits",
)


class WalkCounts:
    """Sums over all verifications since the engine started, under the names of `adapter.stats.Stats`."""

    def __init__(self, num_nodes: int, device: torch.device) -> None:
        self._sums = torch.zeros(len(_COUNTED), dtype=torch.int64, device=device)
        self._accepted_by_depth = torch.zeros(num_nodes, dtype=torch.int64, device=device)

    def add(
        self,
        nodes: torch.Tensor,  # [num_reqs, 1 + N]: the walks, -1 behind their ends
        parents: torch.Tensor,  # [num_reqs, 1 + N]: -1 at roots and in padding
        cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    ) -> None:
        """Count the verifications of one step, without waiting for the device."""
        node = torch.arange(nodes.shape[1], device=nodes.device)
        is_node = parents >= 0
        is_verified = is_node & (node < cu_num_logits.diff()[:, None])
        is_draft = is_verified.any(dim=1)
        is_moved = (nodes > node).any(dim=1)
        self._sums += torch.stack(
            (
                is_draft.sum(),
                is_verified.sum(),
                (is_verified & (parents != node - 1)).any(dim=1).sum(),
                (is_draft & (is_node & ~is_verified).any(dim=1)).sum(),
                is_moved.sum(),
                is_moved.any().long(),
            )
        )
        self._accepted_by_depth += (nodes[:, 1:] >= 0).sum(dim=0)

    def describe(self) -> dict[str, Any]:
        """Return the sums; waits for the device."""
        counts: dict[str, Any] = dict(zip(_COUNTED, self._sums.tolist(), strict=True))
        by_depth = self._accepted_by_depth.tolist()
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
