"""What the parts of one step tell each other: the trees under verification, and where their walks went."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_redrafter.kernels.batch import TreeBatch


@dataclass
class Step:
    """The step that is running; the model state begins it, attention, sampler and speculator read it."""

    trees: list[TreeBatch] = field(default_factory=list)
    """By KV cache group, the trees of the requests with drafts, which come first in vLLM's batch; empty without."""
    has_only_trees: bool = False
    """Whether no request of the batch is without drafts."""
    nodes: torch.Tensor | None = None  # [num_reqs, 1 + N]: the walks' nodes, then -1
    """None until the sampler has walked, and where there was nothing to walk."""
    positions: torch.Tensor | None = None  # [max_num_tokens] int64, the depth counted and not the slot
    """Of every row of the batch; the model state owns it."""
