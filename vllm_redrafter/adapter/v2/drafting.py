"""A draft under model runner V2: from hidden states to trees of one shape, without waiting for the device."""

from __future__ import annotations

from vllm_redrafter import kernels
from vllm_redrafter.core import beam_search
from vllm_redrafter.core.beam_search import SHARPNESS, BeamShape, Choose, Noise
from vllm_redrafter.core.drafter import Embed, ReDrafter
from vllm_redrafter.kernels.batch import DraftStarts, PaddedTrees


def draft(
    drafter: ReDrafter,
    embed: Embed,
    starts: DraftStarts,
    shape: BeamShape,
    out: PaddedTrees,
    noise: Noise | None = None,
    choose: Choose | None = None,
) -> None:
    """Write the trees of the N most probable continuations to `out`.

    Every request gets exactly so many nodes, padding included.

    Args:
        noise: that of what sampling will draw.
        choose: what finds the best continuations at a depth; the kernel by default.
    """
    num_nodes = out.parents.shape[1] - 1
    candidates = beam_search.search(
        drafter,
        embed,
        starts.hidden,
        starts.init_ids,
        shape,
        num_candidates=num_nodes if shape.width > 1 else 1,
        sharpness=SHARPNESS,
        noise=noise,
        choose=choose or kernels.backend().best_continuations,
    )
    kernels.backend().draft_trees(starts.init_ids, candidates, starts.is_linear, out)
