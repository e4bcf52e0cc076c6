"""What runs on the GPU, in Triton: every kernel stands beside its twin in plain torch, under one name and signature.

`few_rows`, `cpu_tree_attention` and `cpu_beam_search` are for CPUs, in C++; the second shares the twin of
`tree_attention`, that of the third is `core.beam_search`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch

from vllm_redrafter.core.acceptance import Walk
from vllm_redrafter.core.beam_search import Candidates, Choose
from vllm_redrafter.core.drafter import Elementwise
from vllm_redrafter.kernels.batch import (
    AttentionOptions,
    DraftStarts,
    PaddedTrees,
    RequestStates,
    StepRows,
    TreeBatch,
)
from vllm_redrafter.kernels.caches import LayerCaches

_Tensor = torch.Tensor


class Backend(NamedTuple):
    """One set of kernels."""

    name: str
    """"triton" or "reference"."""
    tree_attention: Callable[[_Tensor, _Tensor, _Tensor, TreeBatch, AttentionOptions, _Tensor], None]
    commit_kv: Callable[[LayerCaches, TreeBatch, _Tensor], None]
    target_tokens: Callable[[_Tensor, _Tensor, _Tensor, _Tensor, _Tensor], _Tensor]
    verify_walk: Callable[[_Tensor, _Tensor, _Tensor, _Tensor, _Tensor], Walk]
    count_walks: Callable[[_Tensor, _Tensor, _Tensor, _Tensor, _Tensor], None]
    draft_starts: Callable[[_Tensor, _Tensor | None, StepRows, RequestStates, bool, DraftStarts], None]
    sampling_noise: Callable[[_Tensor, _Tensor, _Tensor, _Tensor, int], _Tensor]
    silu_of_sum: Callable[[_Tensor, _Tensor], _Tensor]
    plus_silu: Callable[[_Tensor, _Tensor], _Tensor]
    best_continuations: Choose
    draft_trees: Callable[[_Tensor, Candidates, _Tensor, PaddedTrees], None]
    store_trees: Callable[[PaddedTrees, _Tensor, _Tensor, PaddedTrees], None]
    tree_positions: Callable[[_Tensor, _Tensor, _Tensor, _Tensor, _Tensor], None]


@functools.cache
def backend() -> Backend:
    """Return the kernels of this process: Triton's on a GPU or where it interprets them, else the twins in torch."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if find_spec("triton") is not None and (interpreted or torch.cuda.is_available()):
        from vllm_redrafter.kernels import (
            best_continuations,
            commit_kv,
            count_walks,
            draft_starts,
            draft_trees,
            elementwise,
            sampling_noise,
            store_trees,
            tree_attention,
            tree_positions,
            verify_walk,
        )

        return Backend(
            "triton",
            tree_attention.tree_attention,
            commit_kv.commit_kv,
            verify_walk.target_tokens,
            verify_walk.verify_walk,
            count_walks.count_walks,
            draft_starts.draft_starts,
            sampling_noise.sampling_noise,
            elementwise.silu_of_sum,
            elementwise.plus_silu,
            best_continuations.best_continuations,
            draft_trees.draft_trees,
            store_trees.store_trees,
            tree_positions.tree_positions,
        )
    from vllm_redrafter.kernels import reference

    return Backend(
        "reference",
        reference.tree_attention,
        reference.commit_kv,
        reference.target_tokens,
        reference.verify_walk,
        reference.count_walks,
        reference.draft_starts,
        reference.sampling_noise,
        reference.silu_of_sum,
        reference.plus_silu,
        reference.best_continuations,
        reference.draft_trees,
        reference.store_trees,
        reference.tree_positions,
    )


def elementwise_of_backend() -> Elementwise:
    """Return what a drafter is to compute with between its matrix products."""
    return Elementwise(backend().silu_of_sum, backend().plus_silu)
