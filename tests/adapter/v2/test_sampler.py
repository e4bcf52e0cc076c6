from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_redrafter.adapter.v2 import sampler as sampler_module
from vllm_redrafter.adapter.v2.sampler import TreeSampler
from vllm_redrafter.adapter.v2.step import Step
from vllm_redrafter.adapter.v2.tree_buffers import TreeBuffers
from vllm_redrafter.kernels.batch import PaddedTrees

VOCAB = 10
CPU = torch.device("cpu")
# of three requests: a fork whose second child is right, one without drafts, a chain of which the first node is right
CHOSEN = [4, 0, 7, 9, 6, 3, 5]
NUM_ROWS = [3, 1, 3]


class StockSampler:
    """Draws the best token, and remembers what it was given."""

    compute_nans = False
    logprobs_mode = "raw_logprobs"

    def __init__(self, logprobs_dims: tuple[int, int] | None) -> None:
        self.get_logprobs_dims = lambda slots: logprobs_dims
        self.logprob_token_ids_state = "named tokens"
        self.req_states = SimpleNamespace(prefill_len=SimpleNamespace(gpu=None))
        self.calls: list[dict[str, Any]] = []

    def sample(
        self,
        logits: torch.Tensor,
        slots_of_rows: torch.Tensor,
        slots: torch.Tensor,
        slots_np: Any,
        positions: torch.Tensor,
        input_ids: torch.Tensor,
        local_positions: torch.Tensor,
        seq_lens: Any,
        return_logprobs: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append({"positions": positions.tolist(), "slots": slots.tolist(), "rows": len(logits)})
        assert local_positions[0] == 0, "a request was divided"
        assert len(slots) == len(slots_np) == len(seq_lens)
        return logits.argmax(dim=1), logits


def logits() -> torch.Tensor:
    found = torch.zeros(len(CHOSEN), VOCAB)
    found[torch.arange(len(CHOSEN)), CHOSEN] = 5.0
    # what tells rows apart where log-probabilities are looked up
    return found + torch.arange(len(CHOSEN))[:, None] / 100


def batch() -> SimpleNamespace:
    ends = np.cumsum([0, *NUM_ROWS])
    local = torch.cat([torch.arange(rows) for rows in NUM_ROWS])
    slots = np.array([2, 0, 1])
    return SimpleNamespace(
        num_reqs=3,
        idx_mapping=torch.from_numpy(slots),
        idx_mapping_np=slots,
        expanded_idx_mapping=torch.from_numpy(slots.repeat(NUM_ROWS)),
        expanded_local_pos=local,
        logits_indices=torch.tensor([0, 1, 2, 9, 10, 11, 12]),
        input_ids=torch.tensor([1, 3, 4, 0, 0, 0, 0, 0, 0, 8, 2, 6, 1]),
        cu_num_logits=torch.from_numpy(ends),
        cu_num_logits_np=ends,
        seq_lens=torch.tensor([8, 12, 20]),
        seq_lens_cpu_upper_bound=torch.tensor([8, 12, 20]),
    )


@pytest.fixture
def tree_sampler(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> TreeSampler:
    """The sampler, with vLLM's Triton kernels around it replaced."""

    def count(num_sampled: torch.Tensor, seq_lens: Any, ends: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        return num_sampled, ends.diff() - num_sampled

    monkeypatch.setattr(sampler_module, "get_num_sampled_and_rejected", count)
    monkeypatch.setattr(sampler_module, "compute_topk_scores", lambda *args, **kwargs: (args, kwargs))
    trees = TreeBuffers(4, 2, CPU)
    fork_and_chain = PaddedTrees(
        torch.empty(2, 3),
        torch.tensor([[-1, 0, 0], [-1, 0, 1]]),
        torch.tensor([[0, 1, 1], [0, 1, 2]]),
        torch.tensor([[1, 3, 5], [1, 3, 7]]),
    )
    trees.store(torch.tensor([2, 1]), fork_and_chain, torch.tensor([1, 1]))
    logprobs_dims = getattr(request, "param", None)
    return TreeSampler(StockSampler(logprobs_dims), trees, Step(), torch.arange(100, 120))


def test_every_request_walks_its_own_tree_as_far_as_the_target_goes(tree_sampler: TreeSampler) -> None:
    output = tree_sampler(logits(), batch())

    assert output.sampled_token_ids.tolist() == [[4, 7, -1], [9, -1, -1], [6, 3, -1]]
    assert tree_sampler.step.nodes is not None
    assert tree_sampler.step.nodes.tolist() == [[0, 2, -1], [0, -1, -1], [0, 1, -1]]
    assert output.num_sampled.tolist() == [2, 1, 2]
    assert output.num_rejected.tolist() == [1, 0, 1]
    assert output.logprobs_tensors is None
    assert tree_sampler.counts.describe()["num_branch_acceptances"] == 1


def test_tokens_are_drawn_at_the_positions_of_depths(tree_sampler: TreeSampler) -> None:
    tree_sampler(logits(), batch())

    [call] = tree_sampler.sampler.calls
    assert call["positions"] == [100, 101, 102, 109, 110, 111, 112]


@pytest.mark.parametrize(("most_rows", "chunks"), [(7, [7]), (6, [4, 3]), (3, [3, 1, 3]), (1, [3, 1, 3])])
def test_rows_beyond_a_limit_are_drawn_request_by_request(
    tree_sampler: TreeSampler, monkeypatch: pytest.MonkeyPatch, most_rows: int, chunks: list[int]
) -> None:
    monkeypatch.setattr(sampler_module, "get_max_chunk_logits", lambda vocab_size: most_rows)

    output = tree_sampler(logits(), batch())

    assert output.sampled_token_ids.tolist() == [[4, 7, -1], [9, -1, -1], [6, 3, -1]]
    assert [call["rows"] for call in tree_sampler.sampler.calls] == chunks


def test_a_draft_that_a_grammar_could_not_look_at_is_not_accepted(tree_sampler: TreeSampler) -> None:
    invalid = torch.tensor([False, False, True, False, False, False, False])

    output = tree_sampler(logits(), batch(), invalid_drafts=invalid)

    assert output.sampled_token_ids.tolist() == [[4, -1, -1], [9, -1, -1], [6, 3, -1]]


@pytest.mark.parametrize("tree_sampler", [(3, 2)], indirect=True)
def test_logprobs_are_those_of_the_rows_that_were_walked(tree_sampler: TreeSampler) -> None:
    output = tree_sampler(logits(), batch())

    (shown, num_logprobs, tokens, ends), named = output.logprobs_tensors
    assert (named["logprob_token_ids_state"], named["max_per_req_token_ids"]) == ("named tokens", 2)
    assert torch.equal(named["expanded_idx_mapping"], batch().expanded_idx_mapping)
    assert (num_logprobs, ends) == (3, [0, 3, 4, 7])
    emitted = [0, 1, 3, 4, 5]
    assert tokens[emitted].tolist() == [4, 7, 9, 6, 3]
    assert torch.equal(shown[emitted], logits()[[0, 2, 3, 4, 5]])
