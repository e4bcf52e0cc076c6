from __future__ import annotations

import inspect

import pytest
import torch

from vllm_redrafter.kernels import Backend, backend, reference

tree_attention = pytest.importorskip(
    "vllm_redrafter.kernels.tree_attention", reason="needs Triton", exc_type=ImportError
)
commit_kv = pytest.importorskip("vllm_redrafter.kernels.commit_kv", reason="needs Triton", exc_type=ImportError)
sampling_noise = pytest.importorskip(
    "vllm_redrafter.kernels.sampling_noise", reason="needs Triton", exc_type=ImportError
)
best_continuations = pytest.importorskip(
    "vllm_redrafter.kernels.best_continuations", reason="needs Triton", exc_type=ImportError
)
count_walks = pytest.importorskip("vllm_redrafter.kernels.count_walks", reason="needs Triton", exc_type=ImportError)
draft_starts = pytest.importorskip("vllm_redrafter.kernels.draft_starts", reason="needs Triton", exc_type=ImportError)
draft_trees = pytest.importorskip("vllm_redrafter.kernels.draft_trees", reason="needs Triton", exc_type=ImportError)
elementwise = pytest.importorskip("vllm_redrafter.kernels.elementwise", reason="needs Triton", exc_type=ImportError)
store_trees = pytest.importorskip("vllm_redrafter.kernels.store_trees", reason="needs Triton", exc_type=ImportError)
tree_positions = pytest.importorskip(
    "vllm_redrafter.kernels.tree_positions", reason="needs Triton", exc_type=ImportError
)
verify_walk = pytest.importorskip("vllm_redrafter.kernels.verify_walk", reason="needs Triton", exc_type=ImportError)


def test_interpreted_kernels_are_tritons() -> None:
    chosen = backend()

    assert chosen.name == "triton"
    assert chosen[1:] == (
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_twins_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")

    chosen = backend()

    assert chosen.name == "reference"
    assert {function.__module__ for function in chosen[1:]} == {reference.__name__}


@pytest.mark.parametrize("name", Backend._fields[1:])
def test_kernel_and_twin_have_one_signature(name: str) -> None:
    modules = (
        tree_attention,
        commit_kv,
        verify_walk,
        count_walks,
        draft_starts,
        sampling_noise,
        elementwise,
        best_continuations,
        draft_trees,
        store_trees,
        tree_positions,
    )
    (kernel,) = (vars(module)[name] for module in modules if callable(vars(module).get(name)))

    assert inspect.signature(kernel) == inspect.signature(getattr(reference, name))
