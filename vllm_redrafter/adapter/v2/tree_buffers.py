"""The trees that wait to be verified, by request slot, in buffers that stay where they are.

With async scheduling a step is prepared before the last one has ended: all that the scheduler knows of a draft is its
length. What the tokens are to each other is written and read here, on the device, by the slot that vLLM's
`RequestState` gives a request.
"""

from __future__ import annotations

import torch

from vllm_redrafter import kernels
from vllm_redrafter.kernels.batch import PaddedTrees


class TreeBuffers:
    """Parents, depths and ancestors of every request's tree, each [max_num_reqs, 1 + N]."""

    def __init__(self, max_num_reqs: int, num_nodes: int, device: torch.device) -> None:
        self._kept = PaddedTrees.zeros(max_num_reqs, num_nodes, device)
        self.parents, self.depths, self.ancestors = self._kept.parents, self._kept.depths, self._kept.ancestors
        self.parents.fill_(-1)
        self.ancestors[:, 0] = 1

    def clear(self, slot: int) -> None:
        """Leave the root alone: whatever is scheduled for this slot as drafts is padding."""
        self.parents[slot].fill_(-1)
        self.depths[slot].zero_()
        self.ancestors[slot, 1:].zero_()

    def store(
        self,
        slots: torch.Tensor,  # [batch] int32
        trees: PaddedTrees,
        num_sampled: torch.Tensor,  # [batch] int32: 0 where a request is in the middle of its prompt, and has no tree
    ) -> None:
        """Write the trees of a batch to its slots."""
        kernels.backend().store_trees(trees, slots, num_sampled, self._kept)
