"""Ways to break the adapter for model runner V2 inside an engine's process, and guards that fail where it is broken."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.mutations import assert_state_of_training, replaced
from tests.kernels.launches import launches_a_kernel


@contextmanager
def drop_the_commit() -> Iterator[None]:
    """Leave accepted branches where they are: their slots keep the keys and values of the first path."""
    from vllm_redrafter.adapter.v2.model_state import TreeModelState

    with replaced(TreeModelState, "postprocess_state", lambda original: lambda self, *arguments: None):
        yield


@contextmanager
def leave_positions_linear() -> Iterator[None]:
    """Give node i the position of slot i, not that of its depth."""
    from vllm_redrafter.adapter.v2.model_state import TreeModelState

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(self: Any, input_batch: Any, req_states: Any) -> Any:
            inputs = original(self, input_batch, req_states)
            inputs["positions"].copy_(input_batch.positions)
            return inputs

        return prepare

    with replaced(TreeModelState, "prepare_inputs", wrap):
        yield


@contextmanager
def attend_to_every_earlier_node() -> Iterator[None]:
    """Attend along the slots, as if every tree were a chain."""
    from vllm_redrafter.adapter.v2.model_state import TreeModelState

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(self: Any, *arguments: Any, **more: Any) -> Any:
            prepared = original(self, *arguments, **more)
            nodes = torch.arange(self.ancestors.shape[1])
            self.ancestors.copy_((1 << nodes).cumsum(0).expand_as(self.ancestors))
            return prepared

        return prepare

    with replaced(TreeModelState, "prepare_attn", wrap):
        yield


@contextmanager
def keep_ancestors_where_no_graph_looks() -> Iterator[None]:
    """Give every step its trees in new memory: right, where nothing is replayed."""
    from vllm_redrafter.adapter.v2.model_state import TreeModelState

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(self: Any, *arguments: Any, **more: Any) -> Any:
            before = self.ancestors.clone()
            prepared = original(self, *arguments, **more)
            self.step.trees = [trees._replace(ancestors=trees.ancestors.clone()) for trees in self.step.trees]
            self.ancestors.copy_(before)
            return prepared

        return prepare

    with replaced(TreeModelState, "prepare_attn", wrap):
        yield


@contextmanager
def keep_hidden_states_where_no_graph_looks() -> Iterator[None]:
    """Draft from new memory at every step: right, where nothing is replayed."""
    from vllm_redrafter.adapter.v2.speculator import TreeSpeculator

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def propose(self: Any, *arguments: Any, **more: Any) -> Any:
            self._starts = self._starts._replace(hidden=torch.zeros_like(self._starts.hidden))
            return original(self, *arguments, **more)

        return propose

    with replaced(TreeSpeculator, "propose", wrap):
        yield


@contextmanager
def expect_the_states_of_training() -> Iterator[None]:
    """Fail where the drafter is handed other hidden states than it would be trained on."""
    from transformers import AutoModelForCausalLM

    from vllm_redrafter.adapter.v2.model_state import TreeModelState
    from vllm_redrafter.adapter.v2.speculator import TreeSpeculator
    from vllm_redrafter.training.target import FrozenTarget

    targets: list[FrozenTarget] = []
    states: list[Any] = []
    num_checked = 0

    def wrap_prepare(original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(self: Any, input_batch: Any, req_states: Any) -> Any:
            states[:] = [req_states]
            return original(self, input_batch, req_states)

        return prepare

    def wrap_propose(original: Callable[..., Any]) -> Callable[..., Any]:
        def propose(self: Any, input_batch: Any, *arguments: Any, **more: Any) -> Any:
            nonlocal num_checked
            drafts = original(self, input_batch, *arguments, **more)
            num_sampled = arguments[4]
            for request, slot in enumerate(input_batch.idx_mapping.tolist()):
                # neither in the middle of a prompt nor in a run of no requests, as at start
                if more.get("dummy_run") or not num_sampled[request]:
                    continue
                if not targets:
                    model = AutoModelForCausalLM.from_pretrained(self.vllm_config.model_config.model)
                    targets.append(FrozenTarget(model))
                text = states[0].all_token_ids.gpu[slot, : states[0].total_len.gpu[slot]].tolist()
                assert_state_of_training(self._starts.hidden[request], targets[0], text, self.options.fused_layers)
                num_checked += 1
            return drafts

        return propose

    with (
        replaced(TreeModelState, "prepare_inputs", wrap_prepare),
        replaced(TreeSpeculator, "propose", wrap_propose),
    ):
        yield
    assert num_checked


@contextmanager
def draft_from_last_states_alone() -> Iterator[None]:
    """Hand the drafter nothing of the layers that it fuses."""
    from vllm_redrafter.adapter.v2.speculator import TreeSpeculator

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, num_requests: int) -> None:
            self._starts.hidden[:, self.hidden_size :] = 0
            original(self, num_requests)

        return run

    with replaced(TreeSpeculator, "_run_draft", wrap):
        yield


@contextmanager
def draft_without_foresight() -> Iterator[None]:
    """Do not tell drafts what sampling will add."""
    from vllm_redrafter.adapter.v2.speculator import TreeSpeculator

    def silent(self: Any, starts: Any, depth: int) -> torch.Tensor:
        return torch.zeros(len(starts.seeds), len(self.drafted_ids))

    with replaced(TreeSpeculator, "_noise", lambda original: silent):
        yield


@contextmanager
def draft_trees_for_everybody() -> Iterator[None]:
    """Draft trees where an option counts the tokens before a row."""
    from vllm_redrafter.adapter.v2 import model_state

    with replaced(model_state, "is_linear", lambda original: lambda parameters: False):
        yield


@contextmanager
def forget_the_branch_of_logprobs() -> Iterator[None]:
    """Report the log-probabilities of the rows that follow a root, as if the accepted path were a chain."""
    from vllm_redrafter.adapter.v2.sampler import TreeSampler

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def logprobs(self: Any, logits: Any, walk: Any, *arguments: Any) -> Any:
            depths = torch.arange(walk.nodes.shape[1]).expand_as(walk.nodes)
            return original(self, logits, walk._replace(nodes=depths.where(walk.nodes >= 0, -1)), *arguments)

        return logprobs

    with replaced(TreeSampler, "_logprobs", wrap):
        yield


_WAITING = ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
"""What makes the host wait for a GPU."""


def setting(flag: list[bool], value: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what wraps a function so that the flag has a value while it runs: is that ours, or somebody else's?"""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            before, flag[0] = flag[0], value
            try:
                return original(*arguments, **more)
            finally:
                flag[0] = before

        return wrapped

    return wrap


@contextmanager
def forbid_waiting() -> Iterator[None]:
    """Fail where our part of a step asks a tensor for its values; what is vLLM's or Triton's interpreter's may."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    from vllm_redrafter.adapter.v2 import sampler
    from vllm_redrafter.adapter.v2.model_state import TreeModelState
    from vllm_redrafter.adapter.v2.sampler import TreeSampler
    from vllm_redrafter.adapter.v2.speculator import TreeSpeculator
    from vllm_redrafter.kernels.launch import Launch

    is_forbidden = [False]

    def guard(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def guarded(self: Any, *arguments: Any, **more: Any) -> Any:
                assert not is_forbidden[0], f"Tensor.{name} waits for the device"
                return original(self, *arguments, **more)

            return guarded

        return wrap

    with ExitStack() as stack:
        for owner, name in (
            (TreeSampler, "__call__"),
            (TreeSpeculator, "propose"),
            (TreeModelState, "prepare_inputs"),
            (TreeModelState, "postprocess_state"),
        ):
            stack.enter_context(replaced(owner, name, setting(is_forbidden, True)))
        for owner, name in (
            (Launch, "run"),
            (Sampler, "sample"),
            (sampler, "get_num_sampled_and_rejected"),
            (sampler, "compute_topk_scores"),
        ):
            stack.enter_context(replaced(owner, name, setting(is_forbidden, False)))
        for name in _WAITING:
            stack.enter_context(replaced(torch.Tensor, name, guard(name)))
        yield


MOST_LAUNCHES = 11
"""Of kernels in a step of decoding, by us and outside all graphs, where logits are bare."""


@contextmanager
def forbid_many_launches() -> Iterator[None]:
    """Fail where our part of a step launches more kernels than it needs: a GPU takes microseconds for the smallest."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    from vllm_redrafter.adapter.v2 import sampler
    from vllm_redrafter.adapter.v2.model_state import TreeModelState
    from vllm_redrafter.adapter.v2.sampler import TreeSampler
    from vllm_redrafter.adapter.v2.speculator import TreeSpeculator
    from vllm_redrafter.kernels.launch import Launch

    is_ours, by_step, launched, kernels = [False], list[list[str]](), list[str](), set[str]()

    def end_step(original: Callable[..., Any]) -> Callable[..., Any]:
        def propose(*arguments: Any, **more: Any) -> Any:
            drafts = original(*arguments, **more)
            by_step.append(launched.copy())
            launched.clear()
            return drafts

        return propose

    def count(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Launch) -> None:
            kernels.add(self.kernel.__name__)
            if is_ours[0]:
                launched.append(self.kernel.__name__)
            setting(is_ours, False)(original)(self)

        return run

    class LaunchCounter(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if is_ours[0] and launches_a_kernel(function, result, (args, kwargs)):
                launched.append(function.name())
            return result

    with ExitStack() as stack:
        for owner, name in (
            (TreeSampler, "__call__"),
            (TreeModelState, "prepare_attn"),
            (TreeModelState, "prepare_inputs"),
            (TreeModelState, "postprocess_state"),
            (TreeSpeculator, "propose"),
        ):
            stack.enter_context(replaced(owner, name, setting(is_ours, True)))
        stack.enter_context(replaced(TreeSpeculator, "propose", end_step))
        for owner, name in (
            (DefaultModelState, "prepare_attn"),
            (DefaultModelState, "prepare_inputs"),
            (TreeSpeculator, "_run_draft"),
            (Sampler, "sample"),
            (sampler, "get_num_sampled_and_rejected"),
        ):
            stack.enter_context(replaced(owner, name, setting(is_ours, False)))
        stack.enter_context(replaced(Launch, "run", count))
        stack.enter_context(LaunchCounter())
        yield
    assert "_silu_kernel" in kernels, "the drafter has its sums and SiLU from torch"
    verifying = [step for step in by_step if "_walk_kernel" in step]
    assert verifying
    for step in verifying:
        assert {"_position_kernel", "_count_kernel", "_start_kernel", "_store_kernel"} <= set(step)
        assert len(step) <= MOST_LAUNCHES, step


@contextmanager
def forbid_moving() -> Iterator[None]:
    """Fail where what a CUDA graph would read or write is elsewhere than it was a step before."""
    from vllm_redrafter.adapter.v2.model_state import TreeModelState

    places: dict[str, set[int]] = {}

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def postprocess(self: Any, *arguments: Any, **more: Any) -> Any:
            for owner in (self, self.speculator, self.speculator._starts, self.trees, *self.step.trees):
                owned = owner._asdict() if isinstance(owner, tuple) else vars(owner)
                for name, tensor in owned.items():
                    if isinstance(tensor, torch.Tensor):
                        places.setdefault(f"{type(owner).__name__}.{name}", set()).add(tensor.data_ptr())
            return original(self, *arguments, **more)

        return postprocess

    with replaced(TreeModelState, "postprocess_state", wrap):
        yield
    moved = [name for name, found in places.items() if len(found) != 1]
    expected = {"TreeBatch.ancestors", "TreeModelState.positions", "TreeBuffers.parents", "DraftStarts.hidden"}
    assert expected <= places.keys()
    assert not moved, f"{moved} moved"


@contextmanager
def choose_another_size_at_every_step() -> Iterator[None]:
    """Have all sizes that an automatic budget knows take turns, and fail unless it learns of each what it costs."""
    from vllm_redrafter.adapter.v2.sizes import TreeSizes

    turns, tables, timed, accepted = itertools.count(), [], Counter[int](), Counter[int]()

    def take_turns(original: Callable[..., Any]) -> Callable[..., Any]:
        def choose(self: TreeSizes, batch_size: int) -> int:
            tables.append(self)
            return self._sizes[next(turns) % len(self._sizes)]

        return choose

    def time(original: Callable[..., Any]) -> Callable[..., Any]:
        def observe(self: TreeSizes, batch_size: int, size: int, seconds: float) -> None:
            timed[size] += seconds > 0
            original(self, batch_size, size, seconds)

        return observe

    def count(original: Callable[..., Any]) -> Callable[..., Any]:
        def observe(self: TreeSizes, size: int, num_trees: int, num_accepted: int) -> None:
            assert 0 <= num_accepted <= size * num_trees
            accepted[size] += num_accepted
            original(self, size, num_trees, num_accepted)

        return observe

    with ExitStack() as stack:
        for name, wrap in (("__getitem__", take_turns), ("observe_step", time), ("observe_trees", count)):
            stack.enter_context(replaced(TreeSizes, name, wrap))
        yield
    assert set(timed) == set(tables[0]._sizes), timed
    assert all(accepted[size] for size in timed if size), accepted
