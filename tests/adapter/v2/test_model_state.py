from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_redrafter.adapter.v2.model_state import TreeModelState
from vllm_redrafter.adapter.v2.step import Step
from vllm_redrafter.adapter.v2.tree_buffers import TreeBuffers
from vllm_redrafter.kernels.batch import PaddedTrees
from vllm_redrafter.kernels.caches import layer_caches

MAX_REQUESTS, MAX_TOKENS, NUM_NODES, BLOCK_SIZE = 4, 32, 2, 4


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> TreeModelState:
    """The state as vLLM has it; its constructor needs a target. Slot 1 holds a fork, slot 3 a chain."""
    monkeypatch.setattr(DefaultModelState, "prepare_attn", lambda *args, **kwargs: {"layer": "metadata"})
    made = object.__new__(TreeModelState)
    made.model_config = SimpleNamespace(max_model_len=99)
    made.rope_state = made.prompt_embeds_state = made.adapters = None
    made.supports_mm_inputs = False
    made.trees = TreeBuffers(MAX_REQUESTS, NUM_NODES, torch.device("cpu"))
    made.step = Step()
    made.positions = torch.zeros(MAX_TOKENS, dtype=torch.int64)
    made.ancestors = torch.zeros_like(made.trees.ancestors)
    made.caches = []
    fork_and_chain = PaddedTrees(
        torch.zeros(2, 3, dtype=torch.int64),
        torch.tensor([[-1, 0, 0], [-1, 0, 1]]),
        torch.tensor([[0, 1, 1], [0, 1, 2]]),
        torch.tensor([[1, 3, 5], [1, 3, 7]]),
    )
    made.trees.store(torch.tensor([1, 3]), fork_and_chain, torch.tensor([1, 1]))
    return made


def batch(**changes: Any) -> Any:
    """Return a fork and a chain behind contexts of 5 and 9 tokens, and a prompt's first four tokens."""
    found = {
        "num_reqs": 3,
        "num_tokens": 10,
        "num_tokens_after_padding": 12,
        "num_draft_tokens_per_req": np.array([2, 2, 0]),
        "idx_mapping": torch.tensor([1, 3, 0]),
        "query_start_loc": torch.tensor([0, 3, 6, 10], dtype=torch.int32),
        "seq_lens": torch.tensor([8, 12, 4], dtype=torch.int32),
        "seq_lens_cpu_upper_bound": torch.tensor([8, 12, 4]),
        "positions": torch.tensor([5, 6, 7, 9, 10, 11, 0, 1, 2, 3, 0, 0]),
        "logits_indices": torch.tensor([0, 1, 2, 3, 4, 5, 9]),
        "expanded_idx_mapping": torch.tensor([1, 1, 1, 3, 3, 3, 0]),
        "expanded_local_pos": torch.tensor([0, 1, 2, 0, 1, 2, 0]),
    }
    return SimpleNamespace(**{**found, **changes})


TABLES = (torch.arange(12, dtype=torch.int32).view(3, 4),)


def test_requests_with_drafts_are_verified_as_trees_and_the_others_are_not(state: TreeModelState) -> None:
    assert state.prepare_attn(batch(), None, TABLES) == {"layer": "metadata"}

    [trees] = state.step.trees
    assert trees.ancestors.tolist() == [[1, 3, 5], [1, 3, 7]]
    assert trees.query_start_loc.tolist() == [0, 3, 6]
    assert trees.seq_lens.tolist() == [8, 12]
    assert torch.equal(trees.block_table, TABLES[0][:2])
    assert trees.max_seq_len == 12
    assert not state.step.has_only_trees


def test_a_step_without_drafts_forgets_the_one_before(state: TreeModelState) -> None:
    state.prepare_attn(batch(), None, TABLES)
    state.step.nodes = torch.zeros(3, 3)

    state.prepare_attn(batch(num_draft_tokens_per_req=None), None, TABLES)

    assert (state.step.trees, state.step.nodes, state.step.has_only_trees) == ([], None, False)


def test_a_graph_of_uniform_decodes_is_captured_with_trees_in_the_buffers_of_every_step(state: TreeModelState) -> None:
    dummy = batch(num_tokens=9, num_draft_tokens_per_req=None)

    state.prepare_attn(dummy, None, TABLES, for_capture=True)

    [trees] = state.step.trees
    assert state.step.has_only_trees
    assert trees.max_seq_len == 99
    for found, expected in (
        (trees.ancestors, state.ancestors),
        (trees.block_table, TABLES[0]),
        (trees.seq_lens, dummy.seq_lens),
        (trees.query_start_loc, dummy.query_start_loc),
    ):
        assert found.data_ptr() == expected.data_ptr()
    assert state.get_additional_cg_support()[0] == AttentionCGSupport.UNIFORM_BATCH


def test_a_graph_of_single_tokens_is_captured_without_trees(state: TreeModelState) -> None:
    state.prepare_attn(batch(num_tokens=3, num_draft_tokens_per_req=None), None, TABLES, for_capture=True)

    assert state.step.trees == []


def test_nodes_stand_at_the_positions_of_their_depths(state: TreeModelState) -> None:
    inputs = state.prepare_inputs(batch(), None)

    assert inputs["positions"].tolist() == [5, 6, 6, 9, 10, 11, 0, 1, 2, 3, 0, 0]
    assert inputs["positions"].data_ptr() == state.prepare_dummy_inputs(3, 12)["positions"].data_ptr()


def test_accepted_branches_move_to_their_slots_in_every_cache(state: TreeModelState) -> None:
    kinds = [torch.arange(12.0 * BLOCK_SIZE * size).view(12, BLOCK_SIZE, 1, size) for size in (2, 3)]
    before = [cache.clone() for cache in kinds]
    state.caches = [[layer_caches([cache]) for cache in kinds]]
    state.prepare_attn(batch(), None, TABLES)

    state.postprocess_state(torch.tensor([1, 3, 0]), None)
    assert all(torch.equal(*pair) for pair in zip(kinds, before, strict=True))

    state.step.nodes = torch.tensor([[0, 2, -1], [0, 1, 2], [0, -1, -1]])
    state.postprocess_state(torch.tensor([1, 3, 0]), None)

    # the fork's second child stood in slot 7, block 1, and belongs into slot 6
    for cache, old in zip(kinds, before, strict=True):
        assert torch.equal(cache[1, 2], old[1, 3])
        cache[1, 2] = old[1, 2]
        assert torch.equal(cache, old)
