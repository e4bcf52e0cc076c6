"""The trees that wait to be verified, by request slot, in buffers that stay where they are.

With async scheduling a step is prepared before the last one has ended: all that the scheduler knows of a draft is its
length. What the tokens are to each other is written and read here, on the device, by the slot that vLLM's
`RequestState` gives a request.
"""

from __future__ import annotations

import torch

from vllm_redrafter.kernels.batch import PaddedTrees


class TreeBuffers:
    """Parents, depths and ancestors of every request's tree, each [max_num_reqs, 1 + N]."""

    def __init__(self, max_num_reqs: int, num_nodes: int, device: torch.device) -> None:
        shape = (max_num_reqs, 1 + num_nodes)
        self.parents = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.depths = torch.zeros(shape, dtype=torch.int64, device=device)
        self.ancestors = torch.zeros(shape, dtype=torch.int64, device=device)
        self.ancestors[:, 0] = 1

    def clear(self, slot: int) -> None:
        """Leave the root alone: whatever is scheduled for this slot as drafts is padding."""
        self.parents[slot].fill_(-1)
        self.depths[slot].zero_()
        self.ancestors[slot, 1:].zero_()

    def store(
        self,
        slots: torch.Tensor,  # [batch]
        trees: PaddedTrees,
        is_drafted: torch.Tensor,  # [batch] bool: requests that are in the middle of their prompt have no draft
    ) -> None:
        """Write the trees of a batch to its slots."""
        kept = is_drafted[:, None]
        is_root = torch.arange(trees.parents.shape[1], device=kept.device) == 0
        self.parents[slots] = trees.parents.masked_fill(~kept, -1)
        self.depths[slots] = trees.depths.masked_fill(~kept, 0)
        self.ancestors[slots] = trees.ancestors.masked_fill(~(kept | is_root), 0)
