from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from tests.adapter.clocks import tell_seconds
from tests.adapter.trees import draft_tree
from vllm_redrafter.adapter import loading
from vllm_redrafter.adapter import proposer as proposer_module
from vllm_redrafter.adapter.config import ReDrafterOptions
from vllm_redrafter.adapter.proposer import ReDrafterProposer
from vllm_redrafter.adapter.searcher import SEVERAL, Searcher
from vllm_redrafter.adapter.tree_batch import DraftTree, chain_of, path_segments
from vllm_redrafter.core import beam_search, token_tree
from vllm_redrafter.core.beam_search import SHARPNESS, BeamShape, Candidates
from vllm_redrafter.core.checkpoint import load_drafter, save_drafter
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.kernels.cpu_library import NotCompiledError

HIDDEN, VOCAB, BATCH = 16, 24, 5
NO_FLOOR = float("-inf")


def proposer_of(
    options: ReDrafterOptions,
    dtype: torch.dtype = torch.float32,
    num_ranks: int = 1,
    most_requests: int = 8,
) -> ReDrafterProposer:
    """Return the proposer as vLLM builds it: from its config alone."""
    found = SimpleNamespace(
        additional_config={"redrafter": asdict(options)},
        model_config=SimpleNamespace(dtype=dtype),
        parallel_config=SimpleNamespace(tensor_parallel_size=num_ranks),
        scheduler_config=SimpleNamespace(max_num_seqs=most_requests),
    )
    return ReDrafterProposer(found)


def loaded(width: int = 4, length: int = 4, num_nodes: int = 12) -> ReDrafterProposer:
    torch.manual_seed(0)
    proposer = proposer_of(ReDrafterOptions("unused", num_nodes, width, length, "auto"))
    drafter = ReDrafter(ReDrafterConfig(HIDDEN, VOCAB, num_draft_layers=1)).eval()
    for parameter in drafter.parameters():
        parameter.data *= 3  # surer, so that trees differ in shape
    proposer.hold(drafter, nn.Embedding(VOCAB, HIDDEN))
    return proposer


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, HIDDEN, generator=generator), torch.randint(VOCAB, (BATCH,), generator=generator)


def vllm_module(kind: type[nn.Module], weight: torch.Tensor | None) -> nn.Module:
    """Return a layer of vLLM's that holds a weight; its constructor needs a running engine."""
    module = object.__new__(kind)
    nn.Module.__init__(module)
    module.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
    if weight is not None:
        module.forward = partial(functional.embedding, weight=weight)
    return module


def vllm_target(embedding: torch.Tensor, head: torch.Tensor | None) -> nn.Module:
    """Return a target with vLLM's own layers, the head first where there is one."""
    layers: list[nn.Module] = [] if head is None else [vllm_module(ParallelLMHead, head)]
    return nn.Sequential(*layers, nn.Linear(2, 2), vllm_module(VocabParallelEmbedding, embedding))


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "get_tensor_model_parallel_world_size", lambda: 1)


# trees


@pytest.mark.parametrize("width", [1, 2, 6])
def test_every_request_gets_the_best_nodes_of_its_own_budget(width: int) -> None:
    proposer = loaded(width)
    hidden, init_ids = inputs()
    candidates = proposer.search(hidden, init_ids, NO_FLOOR)
    budgets = [12, 1, 0, 5, 3]

    trees = proposer.trees(candidates, budgets, [False] * BATCH)

    for row, (tree, budget) in enumerate(zip(trees, budgets, strict=True)):
        alone = Candidates(*(column[row : row + 1] for column in candidates))
        expected = chain_of([])
        if budget > 0:
            expected = draft_tree(token_tree.best_nodes(init_ids[row : row + 1], alone, budget))
        assert tree == expected
        assert len(tree.token_ids) == min(budget, int((alone.log_probs > NO_FLOOR).sum()))
    if width > 1:
        assert any(len(path_segments(tree.parents)) > 1 for tree in trees)


def test_a_batch_without_budget_gets_roots_alone() -> None:
    proposer = loaded()
    hidden, init_ids = inputs()
    candidates = proposer.search(hidden, init_ids, NO_FLOOR)

    assert proposer.trees(candidates, [0] * BATCH, [False] * BATCH) == [DraftTree([], [-1], [0], [])] * BATCH


def test_a_linear_request_gets_the_first_path_of_its_tree_and_its_neighbours_their_trees() -> None:
    proposer = loaded()
    hidden, init_ids = inputs()
    candidates = proposer.search(hidden, init_ids, NO_FLOOR)
    budgets = [12] * BATCH
    trees = proposer.trees(candidates, budgets, [False] * BATCH)

    mixed = proposer.trees(candidates, budgets, [True, False, True, False, False])

    assert [mixed[index] for index in (1, 3, 4)] == [trees[index] for index in (1, 3, 4)]
    for index in (0, 2):
        _, end = path_segments(trees[index].parents)[0]
        chain = mixed[index]
        assert len(path_segments(trees[index].parents)) > 1
        assert chain.token_ids == trees[index].token_ids[: end - 1]
        assert chain._replace(scores=[]) == chain_of(chain.token_ids)
        assert chain.scores == trees[index].scores[: end - 1]


def test_a_beam_of_one_drafts_the_drafters_greedy_chain() -> None:
    proposer = loaded(width=1, length=5)
    hidden, init_ids = inputs()

    candidates = proposer.search(hidden, init_ids, NO_FLOOR)
    trees = proposer.trees(candidates, [12] * BATCH, [False] * BATCH)

    for row, tree in enumerate(trees):
        state, expected = proposer.drafter.start(hidden[row]), []
        token = init_ids[row]
        for _ in range(5):
            state = proposer.drafter.advance(state, proposer.embed(token))
            token = proposer.drafter.logits(state).argmax()
            expected.append(int(token))
        assert tree._replace(scores=[]) == chain_of(expected)


# search


def test_a_wide_search_offers_as_many_leaves_as_may_be_verified_and_ends_at_the_floor() -> None:
    proposer = loaded(width=3, length=4, num_nodes=9)
    hidden, init_ids = inputs()
    shape = BeamShape(3, 4)
    core = beam_search.search(
        proposer.drafter, proposer.embed, hidden, init_ids, shape, num_candidates=9, sharpness=SHARPNESS
    )

    for ours, expected in zip(proposer.search(hidden, init_ids, NO_FLOOR), core, strict=True):
        assert torch.equal(ours, expected)
    assert proposer.search(hidden, init_ids, 0.0).token_ids.shape[1] == 9, "no deeper than one level"


def test_drafts_are_ranked_by_what_is_known_of_the_draws() -> None:
    proposer = loaded(width=3, length=4, num_nodes=9)
    hidden, init_ids = inputs()
    numbers = torch.randn(
        4, len(init_ids), proposer.drafter.config.head_size, generator=torch.Generator().manual_seed(2)
    )

    def foresight(depth: int, logits: torch.Tensor) -> torch.Tensor:
        return logits + numbers[depth][:, None]

    found = proposer.search(hidden, init_ids, NO_FLOOR, foresight)

    expected = beam_search.search(
        proposer.drafter,
        proposer.embed,
        hidden,
        init_ids,
        BeamShape(3, 4),
        num_candidates=9,
        sharpness=SHARPNESS,
        foresight=foresight,
    )
    assert all(torch.equal(*columns) for columns in zip(found, expected, strict=True))
    assert not torch.equal(found.token_ids, proposer.search(hidden, init_ids, NO_FLOOR).token_ids)


def test_hidden_states_of_another_precision_are_converted() -> None:
    proposer = loaded()
    hidden, init_ids = inputs()

    candidates = proposer.search(hidden.bfloat16(), init_ids, NO_FLOOR)

    rounded = proposer.search(hidden.bfloat16().float(), init_ids, NO_FLOOR)
    assert all(torch.equal(*pair) for pair in zip(candidates, rounded, strict=True))


def test_vllms_own_hook_is_not_answered_with_drafts_that_make_no_sense() -> None:
    with pytest.raises(NotImplementedError, match="driven by vllm_redrafter"):
        loaded().propose([[1]], None, None, None)


# loading


def stored(directory: Path, **changes: Any) -> ReDrafterOptions:
    torch.manual_seed(0)
    drafter = ReDrafter(ReDrafterConfig(HIDDEN, VOCAB, num_draft_layers=1, **changes))
    for parameter in drafter.parameters():
        parameter.data = parameter.data.bfloat16().float()  # so that the kernel rounds nothing
    save_drafter(drafter, directory)
    return ReDrafterOptions(str(directory), 8, 2, 3, "auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_drafter_is_loaded_in_the_targets_precision_and_borrows_its_embedding(
    tmp_path: Path, dtype: torch.dtype, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_MOST_FOLDED", 0)
    proposer = proposer_of(stored(tmp_path), dtype)
    target = vllm_target(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN))

    proposer.load_model(target)

    assert {parameter.dtype for parameter in proposer.drafter.parameters()} == {dtype}
    assert proposer.embed is target[-1], "a head is an embedding too, but not this one"


@pytest.mark.parametrize("has_head", [True, False], ids=["own head", "head tied to the embedding"])
def test_a_tied_drafter_uses_the_targets_head_without_its_padding(
    tmp_path: Path, has_head: bool, one_rank: None
) -> None:
    padded = 64  # vLLM pads vocabularies
    embedding, head = torch.randn(padded, HIDDEN), torch.randn(padded, HIDDEN)
    proposer = proposer_of(stored(tmp_path, exit_dim=HIDDEN, tie_lm_head=True))

    proposer.load_model(vllm_target(embedding, head if has_head else None))

    assert torch.equal(proposer.drafter._tied_head, (head if has_head else embedding)[:VOCAB])


def test_the_head_of_a_target_on_many_ranks_is_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "get_tensor_model_parallel_world_size", lambda: 2)
    other_rank = torch.randn(VOCAB // 2, HIDDEN)
    monkeypatch.setattr(
        loading, "tensor_model_parallel_all_gather", lambda ours, dim: torch.cat((ours, other_rank), dim=dim)
    )
    proposer = proposer_of(stored(tmp_path, exit_dim=HIDDEN, tie_lm_head=True, rnn=False))
    ours = torch.randn(VOCAB // 2, HIDDEN)

    proposer.load_model(vllm_target(ours, ours))

    assert torch.equal(proposer.drafter._tied_head, torch.cat((ours, other_rank)))


def test_a_tied_head_that_is_quantised_is_refused(tmp_path: Path, one_rank: None) -> None:
    proposer = proposer_of(stored(tmp_path, exit_dim=HIDDEN, tie_lm_head=True))
    target = nn.Sequential(
        vllm_module(VocabParallelEmbedding, torch.randn(VOCAB, HIDDEN)), vllm_module(ParallelLMHead, None)
    )

    with pytest.raises(NotImplementedError, match="that head is quantised: untie it"):
        proposer.load_model(target)


def test_an_architecture_without_a_token_embedding_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="found no VocabParallelEmbedding in Linear: it cannot draft"):
        proposer_of(stored(tmp_path)).load_model(nn.Linear(2, 2))


def test_loading_says_what_was_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(proposer_module.logger, "info", lambda message, *args: messages.append(message % args))

    proposer_of(stored(tmp_path)).load_model(vllm_target(torch.randn(VOCAB, HIDDEN), None))

    assert messages == [f"Loaded the drafter {tmp_path} (0.0M parameters, torch.float32; 2 x 3 tokens, in one call)"]


def searchers_used(proposer: ReDrafterProposer, monkeypatch: pytest.MonkeyPatch) -> list[Searcher]:
    """Return what searches for one request and for several."""
    hidden, init_ids = inputs()
    used: list[Searcher] = []
    search = Searcher.search
    with monkeypatch.context() as patch:
        patch.setattr(Searcher, "search", lambda self, *how: (used.append(self), search(self, *how))[1])
        for num_requests in (1, BATCH):
            found = proposer.search(hidden[:num_requests], init_ids[:num_requests], NO_FLOOR)
            assert found.log_probs.dtype == torch.float32
    return used


def says_how(proposer: ReDrafterProposer, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return how one request and several are searched for."""
    return {str(searcher).partition(", ")[2] for searcher in searchers_used(proposer, monkeypatch)}


@pytest.mark.parametrize(
    ("num_ranks", "changes", "most_folded", "expected"),
    [
        (1, {}, 1 << 24, "in one call"),
        (1, {}, 0, "in one call"),
        (1, {"exit_dim": HIDDEN, "tie_lm_head": True}, 1 << 24, "in one call"),
        # ranks might round differently
        (2, {}, 1 << 24, "operation by operation"),
        (1, {"top_k": 3}, 1 << 24, "operation by operation"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafts_are_searched_for_in_one_call_where_the_kernel_computes_them(
    num_ranks: int,
    changes: dict[str, Any],
    most_folded: int,
    expected: str,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "_MOST_FOLDED", most_folded)
    monkeypatch.setattr(loading, "get_tensor_model_parallel_world_size", lambda: num_ranks)
    proposer = proposer_of(stored(tmp_path, **changes), dtype, num_ranks=num_ranks)

    proposer.load_model(vllm_target(torch.randn(VOCAB, HIDDEN, dtype=dtype), None))

    assert says_how(proposer, monkeypatch) == {expected}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_embedding_that_is_quantised_or_of_a_rank_is_asked_and_not_read(
    num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_MOST_FOLDED", 0)
    monkeypatch.setattr(loading, "get_tensor_model_parallel_world_size", lambda: num_ranks)
    embedding = vllm_module(VocabParallelEmbedding, torch.randn(VOCAB, HIDDEN))
    if num_ranks == 1:
        embedding.weight = nn.Parameter(torch.ones(VOCAB, HIDDEN, dtype=torch.int8), requires_grad=False)
    proposer = proposer_of(stored(tmp_path))

    proposer.load_model(nn.Sequential(embedding))

    assert says_how(proposer, monkeypatch) == {"operation by operation"}


def test_without_a_compiler_drafts_are_searched_for_as_well(
    tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*how: object) -> None:
        raise NotCompiledError("No working C++ compiler")

    warnings: list[str] = []
    monkeypatch.setattr(proposer_module.logger, "warning", lambda message, *args: warnings.append(message % args))
    monkeypatch.setattr(proposer_module, "PackedDrafter", refuse)
    proposer = proposer_of(stored(tmp_path))

    proposer.load_model(vllm_target(torch.randn(VOCAB, HIDDEN), None))

    assert says_how(proposer, monkeypatch) == {"operation by operation"}
    assert warnings == ["Drafts are searched for operation by operation, which takes longer: No working C++ compiler"]


@pytest.mark.parametrize(
    ("width", "num_nodes", "num_ranks", "expected"),
    [
        (3, 8, 1, (3, 1)),
        # the more nodes, the more beams bring
        (3, 16, 1, (3, 3)),
        (3, 4, 1, (1, 1)),
        # a chain was asked for
        (1, 8, 1, (1, 1)),
        # ranks must draft alike
        (3, 4, 2, (3, 3)),
    ],
)
def test_beams_that_take_more_than_they_bring_are_not_searched(
    width: int, num_nodes: int, num_ranks: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    proposer = proposer_of(ReDrafterOptions("unused", num_nodes, width, 4, "auto"), num_ranks=num_ranks)
    proposer.hold(ReDrafter(ReDrafterConfig(HIDDEN, VOCAB, num_draft_layers=1)).eval(), nn.Embedding(VOCAB, HIDDEN))
    # a beam more takes a hundredth of a step for one request, and three hundredths for several
    tell_seconds(
        monkeypatch, lambda searcher, num_requests: searcher.shape.width * (0.01 if num_requests == 1 else 0.03)
    )

    proposer.tune(dict.fromkeys((1 + num_nodes, SEVERAL + num_nodes), 1.0).__getitem__)

    assert tuple(searcher.shape.width for searcher in searchers_used(proposer, monkeypatch)) == expected


def test_only_one_request_is_timed_where_there_is_never_more(monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = proposer_of(ReDrafterOptions("unused", 8, 4, 4, "auto"), most_requests=1)
    proposer.hold(ReDrafter(ReDrafterConfig(HIDDEN, VOCAB)).eval(), nn.Embedding(VOCAB, HIDDEN))
    timed: list[int] = []
    tell_seconds(monkeypatch, lambda searcher, num_requests: (timed.append(num_requests), 1.0)[1])

    proposer.tune(lambda num_rows: 1.0)

    assert set(timed) == {1}


def test_what_was_chosen_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(proposer_module.logger, "info", lambda message, *args: messages.append(message % args))

    loaded(width=3, length=4).tune(lambda num_rows: 1e6)

    how = "3 x 4 tokens, operation by operation"
    assert messages == [f"Drafting for one request: {how}; for several: {how}"]


@pytest.mark.parametrize("most_folded", [VOCAB * HIDDEN, VOCAB * HIDDEN - 1])
def test_a_small_embedding_table_is_folded_and_drafts_the_same(
    most_folded: int, tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_MOST_FOLDED", most_folded)
    proposer, table = proposer_of(stored(tmp_path)), torch.randn(VOCAB, HIDDEN)
    hidden, init_ids = inputs()

    proposer.load_model(vllm_target(table, None))

    assert isinstance(proposer.drafter.rnn_w, nn.Identity) == (most_folded == VOCAB * HIDDEN)
    drafter = load_drafter(tmp_path)
    expected = beam_search.search(
        drafter,
        nn.Embedding.from_pretrained(table),
        hidden,
        init_ids,
        proposer.options.shape,
        num_candidates=8,
        sharpness=SHARPNESS,
    )
    found = proposer.search(hidden, init_ids, NO_FLOOR)
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
