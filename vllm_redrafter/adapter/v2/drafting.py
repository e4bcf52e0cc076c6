"""A draft under model runner V2: from hidden states to trees of one shape, without waiting for the device."""

from __future__ import annotations

import torch

from vllm_redrafter import kernels
from vllm_redrafter.core import beam_search
from vllm_redrafter.core.beam_search import SHARPNESS, BeamShape, Choose, Noise
from vllm_redrafter.core.drafter import Embed, ReDrafter
from vllm_redrafter.kernels.batch import PaddedTrees


def draft(
    drafter: ReDrafter,
    embed: Embed,
    hidden: torch.Tensor,  # [batch, hidden_size]
    init_ids: torch.Tensor,  # [batch]
    is_linear: torch.Tensor,  # [batch] bool: requests that get the best path alone
    shape: BeamShape,
    num_nodes: int,
    noise: Noise | None = None,
    choose: Choose | None = None,
) -> PaddedTrees:
    """Return the trees of the `num_nodes` most probable continuations.

    Every request gets exactly so many nodes, padding included.

    Args:
        noise: that of what sampling will draw.
        choose: what finds the best continuations at a depth; the kernel by default.
    """
    candidates = beam_search.search(
        drafter,
        embed,
        hidden,
        init_ids,
        shape,
        num_candidates=num_nodes if shape.width > 1 else 1,
        sharpness=SHARPNESS,
        noise=noise,
        choose=choose or kernels.backend().best_continuations,
    )
    return kernels.backend().draft_trees(init_ids, candidates, is_linear, num_nodes)
