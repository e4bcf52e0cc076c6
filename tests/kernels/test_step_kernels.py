"""What a step has done besides attention and walks: worked examples are beside those who call it, in `adapter.v2`."""

from __future__ import annotations

import pytest
import torch

from vllm_redrafter.kernels.batch import DraftStarts

draft_starts = pytest.importorskip("vllm_redrafter.kernels.draft_starts", reason="needs Triton", exc_type=ImportError)
step_kernels = pytest.importorskip("vllm_redrafter.bench.step_kernels", reason="needs Triton", exc_type=ImportError)

KERNELS = ["tree_positions", "count_walks", "draft_starts", "store_trees"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_nodes", [1, 8, 16, 63])
@pytest.mark.parametrize("num_requests", [1, 2, 16, 35])
def test_kernels_write_what_their_twins_write(kernel: str, num_requests: int, num_nodes: int) -> None:
    step = step_kernels.random_step(num_requests, num_nodes, "cpu", seed=num_requests)

    assert step_kernels.compare(kernel, "", step).error == 0


def test_the_cases_hold_what_steps_hold() -> None:
    step = step_kernels.random_step(35, 8, "cpu", seed=35)
    assert step.rows.nodes is not None

    num_rows = step.rows.cu_num_logits.diff()
    assert {1, 9} < set(num_rows.tolist())
    assert 0 in step.rows.num_sampled
    assert step.rows.num_sampled.max() > 2
    assert (step.rows.nodes > torch.arange(9)).any()
    assert not torch.equal(step.rows.logits_indices, torch.arange(int(num_rows.sum())))


@pytest.mark.parametrize("hidden_size", [64, 1000, 1025])
@pytest.mark.parametrize("num_layers", [0, 1, 3])
@pytest.mark.parametrize("has_walks", [True, False])
def test_drafts_start_from_states_of_any_size(hidden_size: int, num_layers: int, has_walks: bool) -> None:
    step = step_kernels.random_step(
        5, 6, "cpu", hidden_size=hidden_size, num_layers=num_layers, has_walks=has_walks, dtype=torch.float16
    )

    assert step_kernels.compare("draft_starts", "", step).error == 0


def test_all_requests_may_get_chains() -> None:
    step = step_kernels.random_step(4, 3, "cpu")
    starts = DraftStarts.zeros(4, 70, torch.float32, torch.device("cpu"))

    for as_chains in (True, False):
        draft_starts.draft_starts(step.hidden, None, step.rows, step.states, as_chains, starts)

        asked = step.states.is_linear[step.rows.slots].bool()
        assert torch.equal(starts.is_linear, asked | as_chains)
        assert not asked.all()


def test_states_of_another_size_than_the_drafter_takes_are_refused() -> None:
    step = step_kernels.random_step(4, 3, "cpu", num_layers=2)
    starts = DraftStarts.zeros(4, 210, torch.float32, torch.device("cpu"))

    with pytest.raises(ValueError, match="takes 210 numbers, but hidden states have 70 and the fused layers None"):
        draft_starts.draft_starts(step.hidden, None, step.rows, step.states, False, starts)
    with pytest.raises(ValueError, match="not contiguous"):
        draft_starts.draft_starts(step.hidden[:, ::2], step.layer_outputs, step.rows, step.states, False, starts)
