"""Ways to break the adapter inside an engine's process; each must be noticed by a comparison with plain vLLM.

The last two break nothing: they set, and look at, what only that process knows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vllm_redrafter.training.target import FrozenTarget


@contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def drop_the_commit() -> Iterator[None]:
    """Leave accepted branches where they are: their slots keep the keys and values of the first path."""
    from vllm_redrafter.adapter import attention

    with replaced(attention, "commit", lambda original: lambda *arguments: None):
        yield


@contextmanager
def leave_positions_linear() -> Iterator[None]:
    """Give node i the position of slot i, not that of its depth."""
    from vllm_redrafter.adapter.runner import TreeModelRunner

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(self: Any, *arguments: Any) -> Any:
            prepared = original(self, *arguments)
            for root_row, tree in zip(self._batch.root_rows, self._batch.trees, strict=True):
                for node in range(1, len(tree.depths)):
                    self.positions[root_row + node] = self.positions[root_row] + node
            return prepared

        return prepare

    with replaced(TreeModelRunner, "_prepare_inputs", wrap):
        yield


@contextmanager
def serve_trees_in_rounds() -> Iterator[None]:
    """Leave attention to the stock kernel, as for layers that ours does not compute; that alone breaks nothing."""
    from vllm_redrafter.adapter.tree_batch import TreeBatch

    with replaced(TreeBatch, "ancestors", lambda original: lambda *arguments: None):
        yield


@contextmanager
def drop_the_path_writes() -> Iterator[None]:
    """Run the attention rounds, but leave the keys and values where the linear slot mapping put them."""
    from vllm_redrafter.adapter import attention_rounds

    with (
        serve_trees_in_rounds(),
        replaced(attention_rounds, "write", lambda original: lambda *arguments: None),
    ):
        yield


@contextmanager
def drop_the_commit_of_rounds() -> Iterator[None]:
    """Leave accepted branches where they are, in rounds."""
    with serve_trees_in_rounds(), drop_the_commit():
        yield


@contextmanager
def attend_to_every_earlier_node() -> Iterator[None]:
    """Show nodes all that lie before them, as if the tree were a chain."""
    from vllm_redrafter.adapter import tree_batch

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda parents: original(range(-1, len(list(parents)) - 1))

    with replaced(tree_batch, "ancestor_words", wrap):
        yield


@contextmanager
def swap_rows_of_packed_products() -> Iterator[None]:
    """Give every row the products of its neighbour where the target's packed matrices multiply."""
    from vllm_redrafter.kernels.few_rows import PackedMatrix

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, x, bias, out: original(self, x.roll(1, dims=0), bias, out)

    with replaced(PackedMatrix, "linear", wrap):
        yield


@contextmanager
def draft_from_the_neighbours_state() -> Iterator[None]:
    """Hand the drafter the hidden state of another request: useless drafts, and no other text."""
    from vllm_redrafter.adapter.runner import TreeModelRunner

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def propose(self: Any, *arguments: Any, **keywords: Any) -> Any:
            self._last_rows = [*self._last_rows[-1:], *self._last_rows[:-1]]
            return original(self, *arguments, **keywords)

        return propose

    with replaced(TreeModelRunner, "propose_draft_token_ids", wrap):
        yield


@contextmanager
def draft_without_foresight() -> Iterator[None]:
    """Do not tell drafts what sampling will add."""
    from vllm_redrafter.adapter.runner import TreeModelRunner

    with replaced(TreeModelRunner, "_foresee", lambda original: lambda self, *arguments: None):
        yield


@contextmanager
def accept_the_padding() -> Iterator[None]:
    """Take the -1 that vLLM pads drafts with for whatever token was drawn."""
    from vllm_redrafter.adapter.tree_batch import DraftTree

    class Children(dict[tuple[int, int], int]):
        def get(self, key: tuple[int, int], default: Any = None) -> Any:
            return super().get(key, super().get((key[0], -1), default))

    with replaced(DraftTree, "children", lambda original: lambda self: Children(original(self))):
        yield


@contextmanager
def draft_trees_for_grammars() -> Iterator[None]:
    """Propose trees to requests whose grammar follows one line of tokens."""
    from vllm_redrafter.adapter.proposer import ReDrafterProposer

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, candidates, budgets, linear: original(self, candidates, budgets, [False] * len(linear))

    with replaced(ReDrafterProposer, "trees", wrap):
        yield


@contextmanager
def hide_accepted_tokens_from_the_sampler() -> Iterator[None]:
    """Draw at every depth as if nothing had been accepted in this step: for penalties, bad words and the like."""
    from vllm_redrafter.adapter.verification import _SamplerDraw

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def append_accepted(self: Any, nodes: list[int]) -> None:
            original(self, nodes)
            for index in self.alive:
                del self.outputs[index][-1]

        return append_accepted

    with replaced(_SamplerDraw, "_append_accepted", wrap):
        yield


@contextmanager
def draw_behind_the_end() -> Iterator[None]:
    """Go on drawing from the generators of requests whose walk has ended."""
    from vllm_redrafter.adapter.verification import _SamplerDraw

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def append_accepted(self: Any, nodes: list[int]) -> None:
            everybody = self.alive
            original(self, nodes)
            self.alive = everybody

        return append_accepted

    with replaced(_SamplerDraw, "_append_accepted", wrap):
        yield


@contextmanager
def give_drafts_a_second_chance() -> Iterator[None]:
    """Draw again where the first token was not drafted: faster, and biased."""
    from vllm_redrafter.adapter import verification

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def walk(trees: Any, draw: Any) -> Any:
            def draw_again(at: list[int]) -> list[int]:
                drafted = [
                    {token for token, parent in zip(tree.token_ids, tree.parents[1:], strict=True) if parent == node}
                    for tree, node in zip(trees, at, strict=True)
                ]
                first, second = draw(at), draw(at)
                return [a if a in tokens else b for a, b, tokens in zip(first, second, drafted, strict=True)]

            return original(trees, draw_again)

        return walk

    with replaced(verification, "walk", wrap):
        yield


@contextmanager
def number_the_generators_of_requests_without_seeds() -> Iterator[None]:
    """Begin them as seeds of 0, 1, 2, ... would."""
    import torch

    from vllm_redrafter.adapter import foresight

    seeds = itertools.count()
    with replaced(foresight, "own_generator", lambda original: lambda: torch.Generator().manual_seed(next(seeds))):
        yield


def assert_state_of_training(
    hidden: torch.Tensor,  # [input_size]
    target: FrozenTarget,
    text: list[int],
    layers: list[int] | None,
) -> None:
    """Fail where a draft of what follows `text` starts from another state than it would be trained on."""
    import torch

    expected = target.hidden(torch.tensor(text[:-1]), layers)[-1]
    # sums in another order, of numbers up to a hundred
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-3)


@contextmanager
def expect_the_states_of_training() -> Iterator[None]:
    """Fail where the drafter is handed other hidden states than it would be trained on."""
    from transformers import AutoModelForCausalLM

    from vllm_redrafter.adapter.proposer import ReDrafterProposer
    from vllm_redrafter.adapter.runner import TreeModelRunner
    from vllm_redrafter.training.target import FrozenTarget

    targets: list[FrozenTarget] = []
    texts: list[list[int]] = []

    def wrap_propose(original: Callable[..., Any]) -> Callable[..., Any]:
        def propose(self: Any, scheduler_output: Any, sampled_token_ids: list[list[int]], *arguments: Any) -> Any:
            if not targets:
                targets.append(FrozenTarget(AutoModelForCausalLM.from_pretrained(self.model_config.model)))
            active = [request for request, new in zip(self.input_batch.req_ids, sampled_token_ids, strict=True) if new]
            requests = [self.requests[request] for request in active]
            texts[:] = [[*request.prompt_token_ids, *request.output_token_ids] for request in requests]
            return original(self, scheduler_output, sampled_token_ids, *arguments)

        return propose

    def wrap_search(original: Callable[..., Any]) -> Callable[..., Any]:
        def search(self: Any, hidden: torch.Tensor, init_ids: torch.Tensor, *how: Any) -> Any:
            layers = self.drafter.config.fused_layers
            for row, init_id, text in zip(hidden, init_ids.tolist(), texts, strict=True):
                assert text[-1] == init_id
                assert_state_of_training(row, targets[0], text, layers)
            return original(self, hidden, init_ids, *how)

        return search

    with (
        replaced(TreeModelRunner, "propose_draft_token_ids", wrap_propose),
        replaced(ReDrafterProposer, "search", wrap_search),
    ):
        yield
