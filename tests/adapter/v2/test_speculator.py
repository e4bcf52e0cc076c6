from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config.compilation import CUDAGraphMode

from tests.adapter.v2.ranks import Ranks
from vllm_redrafter.adapter.config import ReDrafterOptions
from vllm_redrafter.adapter.v2 import drafting
from vllm_redrafter.adapter.v2.speculator import TreeSpeculator
from vllm_redrafter.adapter.v2.step import Step
from vllm_redrafter.adapter.v2.tree_buffers import TreeBuffers
from vllm_redrafter.core.beam_search import best_continuations
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.kernels import reference
from vllm_redrafter.kernels.batch import DraftStarts, PaddedTrees

HIDDEN, VOCAB, MAX_REQUESTS, NUM_NODES = 16, 24, 4, 6
SEEDS = torch.tensor([7, 1 << 40, -5, 123456789])


class Graphs:
    """CUDA graphs of some sizes: a replay runs what was captured, on whatever its buffers hold by then."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        self.captured: dict[int, Callable[[Any], None]] = {}
        self.num_replays = 0

    def capture(self, create_forward_fn: Callable[..., Any], description: str) -> None:
        for size in self.sizes:
            self.captured[size] = create_forward_fn(self._graph(size), warmup=False)
            self.captured[size](CUDAGraphMode.NONE)

    def dispatch(self, num_reqs: int, num_tokens: int, uniform_token_count: int, num_active_loras: int) -> Any:
        fitting = [size for size in self.captured if size >= num_reqs == num_tokens]
        return self._graph(min(fitting)) if fitting else SimpleNamespace(cg_mode=CUDAGraphMode.NONE)

    def run_fullgraph(self, graph: Any) -> None:
        self.num_replays += 1
        self.captured[graph.num_reqs](CUDAGraphMode.NONE)

    def _graph(self, size: int) -> Any:
        return SimpleNamespace(num_reqs=size, cg_mode=CUDAGraphMode.FULL)


def speculator_with(graphs: Graphs, fused_layers: list[int] | None = None) -> TreeSpeculator:
    """Return a speculator as vLLM has it once the drafter is loaded; its constructor needs vLLM's whole config."""
    speculator = object.__new__(TreeSpeculator)
    torch.manual_seed(0)
    config = ReDrafterConfig(HIDDEN, VOCAB, num_draft_layers=1, fused_layers=fused_layers)
    speculator.model = ReDrafter(config).eval().requires_grad_(False)
    if fused_layers:
        nn.init.normal_(speculator.model.fc.weight)  # zeros, until it is trained
    speculator.hidden_size = HIDDEN
    speculator.layer_outputs = None
    speculator.embed = nn.Embedding(VOCAB, HIDDEN).requires_grad_(False)
    speculator.options = ReDrafterOptions("unused", NUM_NODES, 3, 3, "fixed")
    speculator.trees = TreeBuffers(MAX_REQUESTS, NUM_NODES, torch.device("cpu"))
    speculator.step = Step(positions=torch.arange(100, 100 + 2 * MAX_REQUESTS))
    speculator.is_linear = SimpleNamespace(gpu=torch.tensor([0, 1, 0, 0], dtype=torch.int32))
    speculator.is_foreseen = SimpleNamespace(gpu=torch.tensor([1, 1, 1, 0], dtype=torch.int32))
    speculator.drafts_chains_only = False
    speculator.device = torch.device("cpu")
    speculator.drafted_ids = torch.arange(VOCAB)
    speculator.choose = best_continuations
    speculator.cudagraph_manager = graphs
    speculator._starts = DraftStarts.zeros(MAX_REQUESTS, config.input_size, torch.float32, torch.device("cpu"))
    speculator._drafted = PaddedTrees.zeros(MAX_REQUESTS, NUM_NODES, torch.device("cpu"))
    return speculator


def propose(speculator: TreeSpeculator, slots: list[int], nodes: torch.Tensor | None = None, **more: Any) -> Any:
    """Ask for drafts for requests of two rows each, of which the last row has no logits."""
    num_rows = 2 * len(slots)
    generator = torch.Generator().manual_seed(1)
    batch = SimpleNamespace(
        num_reqs=len(slots),
        idx_mapping=torch.tensor(slots),
        logits_indices=torch.arange(num_rows),
        cu_num_logits=torch.arange(0, num_rows + 1, 2),
    )
    hidden = torch.randn(num_rows, HIDDEN, generator=generator)
    last_sampled = torch.randint(VOCAB, (MAX_REQUESTS, 1), generator=generator)
    num_sampled = torch.tensor(more.pop("num_sampled", [1] * len(slots)), dtype=torch.int32)
    temperature = torch.tensor(more.pop("temperatures", [0.0, 1.0, 0.5, 1.0]))
    speculator.step.nodes = nodes
    return speculator.propose(
        batch, None, None, hidden, None, num_sampled, None, last_sampled, None, temperature, SEEDS, **more
    ).clone()


def test_a_replayed_graph_drafts_what_eager_code_drafts() -> None:
    graphs = Graphs(2, 4)
    captured, eager = speculator_with(graphs), speculator_with(Graphs())
    captured.capture()

    for slots in ([3], [2, 0], [1, 3, 0], [0, 1, 2, 3]):
        assert torch.equal(propose(captured, slots), propose(eager, slots))
        for name in ("parents", "depths", "ancestors"):
            assert torch.equal(getattr(captured.trees, name), getattr(eager.trees, name))
    assert graphs.num_replays == 4


def test_a_batch_larger_than_every_graph_is_drafted_without_one() -> None:
    graphs = Graphs(2)
    speculator = speculator_with(graphs)
    speculator.capture()

    assert torch.equal(propose(speculator, [0, 1, 2]), propose(speculator_with(Graphs()), [0, 1, 2]))
    assert graphs.num_replays == 0


def test_nothing_is_drafted_where_nothing_will_be_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    speculator = speculator_with(Graphs())
    drafted: list[int] = []
    monkeypatch.setattr(speculator, "_draft", drafted.append)

    none = propose(speculator, [0, 2], num_speculative_tokens=0)
    some = propose(speculator, [0, 2], num_speculative_tokens=1)

    assert none.shape == some.shape == (2, NUM_NODES)
    assert drafted == [2]


def test_drafts_start_at_the_last_accepted_node() -> None:
    speculator = speculator_with(Graphs())
    at_roots = propose(speculator, [0, 2])

    with_walks = propose(speculator, [0, 2], torch.tensor([[0, 1], [0, -1]]), num_sampled=[2, 1])

    assert not torch.equal(at_roots[0], with_walks[0])
    assert torch.equal(at_roots[1], with_walks[1])


def test_a_drafter_with_fused_layers_is_handed_their_outputs_in_the_same_rows() -> None:
    graphs = Graphs(4)
    captured, eager = speculator_with(graphs, [0, 2]), speculator_with(Graphs(), [0, 2])
    outputs = SimpleNamespace(rows=torch.randn(2 * MAX_REQUESTS, 2 * HIDDEN))
    captured.layer_outputs = eager.layer_outputs = outputs  # type: ignore[assignment]
    captured.capture()

    def drafts_of(speculator: TreeSpeculator) -> torch.Tensor:
        # request 0 accepted the node in its second row
        return propose(speculator, [0, 2], torch.tensor([[0, 1], [0, -1]]), num_sampled=[2, 1])

    drafts = drafts_of(captured)
    assert torch.equal(captured._starts.hidden[:2, HIDDEN:], outputs.rows[[1, 2]])
    assert torch.equal(drafts, drafts_of(eager))
    outputs.rows[[0, 1]] *= -1
    others = drafts_of(captured)
    assert not torch.equal(others[0], drafts[0])
    assert torch.equal(others[1], drafts[1])
    assert graphs.num_replays == 2


def is_chain(parents: torch.Tensor) -> bool:
    """Return whether the nodes of a slot follow each other, and padding follows them."""
    size = 1 + int((parents >= 0).sum())
    return parents.tolist() == [*range(-1, size - 1), *[-1] * (len(parents) - size)]


def test_linear_requests_draft_chains_and_everybody_where_processors_are_unknown() -> None:
    speculator = speculator_with(Graphs())

    propose(speculator, [0, 1])
    assert [is_chain(speculator.trees.parents[slot]) for slot in (0, 1)] == [False, True]

    speculator.drafts_chains_only = True
    propose(speculator, [0, 1])
    assert [is_chain(speculator.trees.parents[slot]) for slot in (0, 1)] == [True, True]
    assert (speculator.trees.parents[:2, 1] == 0).all()


def test_neither_a_dummy_batch_nor_half_a_prompt_leaves_a_tree() -> None:
    speculator = speculator_with(Graphs())

    drafts = propose(speculator, [0, 1], dummy_run=True)
    assert (drafts >= 0).all()
    assert (speculator.trees.parents == -1).all()

    propose(speculator, [0, 2], num_sampled=[0, 1])
    assert (speculator.trees.parents[0] == -1).all()
    assert (speculator.trees.parents[2, 1:] >= 0).all()


@pytest.mark.parametrize("slots", [[0], [0, 1, 2, 3]])
def test_drafts_are_of_one_shape_and_valid(slots: list[int]) -> None:
    drafts = propose(speculator_with(Graphs()), slots)

    assert drafts.shape == (len(slots), NUM_NODES)
    assert ((drafts >= 0) & (drafts < VOCAB)).all()


def test_a_target_with_a_model_state_of_its_own_is_refused() -> None:
    class Hybrid(nn.Module):
        def get_model_state_cls(self) -> type:
            return object

    with pytest.raises(NotImplementedError, match="Hybrid brings its own model state, which knows nothing of trees"):
        speculator_with(Graphs()).load_draft_model(Hybrid(), set())


def test_drafts_are_those_of_the_noise_with_which_the_next_tokens_are_drawn() -> None:
    speculator = speculator_with(Graphs())
    read: list[DraftStarts] = []

    def watched(drafter: Any, embed: Any, starts: DraftStarts, *how: Any) -> None:
        read[:] = [DraftStarts(*(column.clone() for column in starts))]
        drafting.draft(drafter, embed, starts, *how)

    # request 2 accepted the node in its second row, so its root stands one further
    slots, nodes, num_sampled = [1, 2, 3, 0], torch.tensor([[0, -1], [0, 1], [0, -1], [0, -1]]), [1, 2, 1, 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_redrafter.adapter.v2.speculator.draft", watched)
        drafts = propose(speculator, slots, nodes, num_sampled=num_sampled)
    blind = propose(speculator, slots, nodes, num_sampled=num_sampled, temperatures=[0.0] * 4)

    roots, temperatures = torch.tensor([101, 104, 105, 107]), torch.tensor([1.0, 0.5, 0.0, 0.0])

    def noise(depth: int) -> torch.Tensor:
        return reference.sampling_noise(roots + depth, temperatures, SEEDS[slots], torch.arange(VOCAB))

    [starts] = read
    assert starts.is_linear.tolist() == [True, False, False, False]
    expected = PaddedTrees.zeros(4, NUM_NODES, torch.device("cpu"))
    drafting.draft(speculator.model, speculator.embed, starts, speculator.options.shape, expected, noise)
    assert torch.equal(drafts, expected.token_ids[:, 1:])
    same = [torch.equal(*rows) for rows in zip(drafts, blind, strict=True)]
    assert same == [False, False, True, True], "the last two are not foreseen, and greedy"


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_that_share_the_head_draft_what_one_rank_drafts(monkeypatch: pytest.MonkeyPatch, num_ranks: int) -> None:
    ranks = Ranks(num_ranks)
    module = "vllm_redrafter.adapter.v2"
    monkeypatch.setattr(f"{module}.shared_head.tensor_model_parallel_all_gather", ranks.all_gather)
    monkeypatch.setattr(f"{module}.speculator.get_tensor_model_parallel_rank", ranks.rank)
    monkeypatch.setattr(f"{module}.speculator.get_tensor_model_parallel_world_size", lambda: num_ranks)
    alone = speculator_with(Graphs())
    sharing = [speculator_with(Graphs(2, 4)) for _ in range(num_ranks)]

    def draft_as(rank: int) -> list[torch.Tensor]:
        speculator = sharing[rank]
        speculator._share_head(speculator.model)
        speculator.capture()
        return [propose(speculator, slots) for slots in ([3], [2, 0], [0, 1, 2, 3])]

    found = ranks.run(draft_as)

    expected = [propose(alone, slots) for slots in ([3], [2, 0], [0, 1, 2, 3])]
    for rank, drafts in enumerate(found):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(drafts, expected, strict=True))
        assert torch.equal(sharing[rank].trees.parents, alone.trees.parents)
        assert len(sharing[rank].model.lm_head[-1].weight) == VOCAB // num_ranks
