"""How many kernels a draft is: each takes a GPU some two microseconds, whatever it computes."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.launches import counted
from vllm_redrafter.bench.drafts import draft_call, random_drafter
from vllm_redrafter.core.beam_search import BeamShape

pytest.importorskip("triton", reason="needs Triton")


def test_views_and_fresh_memory_are_no_launches() -> None:
    with counted() as launched:
        ((torch.zeros(2, 3) + 1).T[:, None], torch.empty(3).fill_(2))

    assert launched == ["aten::zeros", "aten::add.Tensor", "aten::fill_.Scalar"]


def test_a_draft_is_few_kernels() -> None:
    # two residual blocks, and a draft vocabulary
    draft_five = draft_call(random_drafter(64, 32, 1000, 500, "cpu"), 3, BeamShape(4, 5), num_nodes=16)

    with torch.inference_mode(), counted() as launched:
        draft_five()

    products = [name for name in launched if name == "aten::linear"]
    assert len(products) == 5 * (2 + 1 + 2 + 1) + 1
    # at every depth the embedding, what lies between products, and the best continuations with their ids and states
    assert len(launched) - len(products) <= 5 * 11 + 8
    assert {"_silu_kernel", "_noise_kernel", "_peaks_kernel", "_choose_kernel", "_draft_kernel"} < set(launched)
