"""The small kernels of a step under model runner V2, against their twins and the clock.

Each stands for many smaller ones of torch's, which are its twin, and what it is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from vllm_redrafter.bench import graph_time
from vllm_redrafter.bench.measurement import Measurement, call, share_that_differs
from vllm_redrafter.bench.tree_batches import random_parents
from vllm_redrafter.kernels import count_walks, draft_starts, reference, store_trees, tree_positions
from vllm_redrafter.kernels.batch import COUNTED, DraftStarts, PaddedTrees, RequestStates, StepRows, ancestor_words

_KERNELS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "tree_positions": (tree_positions.tree_positions, reference.tree_positions),
    "count_walks": (count_walks.count_walks, reference.count_walks),
    "draft_starts": (draft_starts.draft_starts, reference.draft_starts),
    "store_trees": (store_trees.store_trees, reference.store_trees),
}
_HIDDEN_SIZE = 4096
_UNWRITTEN = -12345


class StepCase(NamedTuple):
    """A step in which every request verified the tree in its slot, or as much of it as there was room for."""

    trees: PaddedTrees
    """By slot."""
    rows: StepRows
    states: RequestStates
    hidden: torch.Tensor  # [num_rows, hidden_size]
    layer_outputs: torch.Tensor | None  # [num_rows, layers * hidden_size]
    row_slots: torch.Tensor  # [num_logits] int32: whose every row of logits is
    row_nodes: torch.Tensor  # [num_logits] int32: which of its request's rows it is

    def inputs(self, kernel: str) -> tuple[list[Any], tuple[torch.Tensor, ...]]:
        """Return the arguments of a kernel and those of them that it writes, which nobody has written yet."""
        device, num_requests = self.hidden.device, len(self.rows.slots)
        if kernel == "tree_positions":
            positions = self.rows.positions.clone()
            return [
                self.row_slots,
                self.row_nodes,
                self.rows.logits_indices,
                self.trees.depths,
                positions,
            ], (positions,)
        if kernel == "count_walks":
            sums = torch.arange(len(COUNTED) + self.trees.parents.shape[1] - 1, device=device)
            nodes = self.rows.nodes
            return [nodes, self.trees.parents, self.rows.slots, self.rows.cu_num_logits, sums], (sums,)
        if kernel == "draft_starts":
            input_size = self.hidden.shape[1] + (0 if self.layer_outputs is None else self.layer_outputs.shape[1])
            starts = DraftStarts.zeros(num_requests, input_size, self.hidden.dtype, device)
            written = DraftStarts(*(column.fill_(_UNWRITTEN) for column in starts))
            return [self.hidden, self.layer_outputs, self.rows, self.states, False, written], written
        # the trees of the batch are those of its slots in another order
        drafted = PaddedTrees(*(column[:num_requests].contiguous() for column in self.trees))
        kept = PaddedTrees(*(torch.full_like(column, _UNWRITTEN) for column in self.trees))
        return [drafted, self.rows.slots, self.rows.num_sampled, kept], kept


def random_step(
    num_requests: int,
    num_nodes: int,
    device: str,
    *,
    hidden_size: int = 70,
    num_layers: int = 0,
    dtype: torch.dtype = torch.float32,
    has_walks: bool = True,
    seed: int = 0,
) -> StepCase:
    """Return a step of random trees in scattered slots: some cut, some left without nodes, some still at prompts."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randint, generator=generator)
    max_requests = num_requests + 3
    parents = torch.tensor([random_parents(1 + num_nodes, generator) for _ in range(max_requests)])
    ancestors = torch.tensor([ancestor_words(row) for row in parents.tolist()])
    depths = torch.tensor([[word.bit_count() - 1 for word in map(_unsigned, row)] for row in ancestors.tolist()])
    trees = PaddedTrees(draw(3, parents.shape), parents, depths, ancestors)
    slots = torch.randperm(max_requests, generator=generator)[:num_requests].int()
    # of some trees there is a part; of some requests a row, and some of those are at their prompts
    num_rows = torch.where(draw(4, (num_requests,)) > 0, 1 + num_nodes, draw(1, 2 + num_nodes, (num_requests,)))
    is_prompt = (draw(3, (num_requests,)) == 0) & (num_rows == 1)
    cu_num_logits = torch.cat((torch.zeros(1, dtype=torch.int64), num_rows.cumsum(0))).int()
    num_before = torch.where(is_prompt, 5, 0).cumsum(0)
    requests = torch.arange(num_requests).repeat_interleave(num_rows)
    num_logits = len(requests)
    logits_indices = torch.arange(num_logits) + num_before[requests]
    choices, token_ids = draw(3, (num_logits,)), draw(3, (num_logits,))
    walk = reference.verify_walk(token_ids, parents, slots, cu_num_logits, choices)
    num_batch_rows = int(logits_indices[-1]) + 1 + 4
    rows = StepRows(
        slots,
        cu_num_logits,
        logits_indices,
        draw(1 << 20, (num_batch_rows,)),
        torch.where(is_prompt, 0, walk.num_accepted + 1).int(),
        walk.nodes if has_walks else None,
    )
    states = RequestStates(
        draw(1000, (max_requests, 1)),
        torch.rand(max_requests, generator=generator),
        draw(1 << 40, (max_requests,)),
        draw(2, (max_requests,)).int(),
        draw(2, (max_requests,)).int(),
    )
    hidden = torch.randn(num_batch_rows, hidden_size, generator=generator).to(dtype)
    outputs = torch.randn(num_batch_rows + 2, num_layers * hidden_size, generator=generator).to(dtype)
    case = StepCase(
        trees,
        rows,
        states,
        hidden,
        outputs if num_layers else None,
        slots[requests],
        (torch.arange(num_logits) - cu_num_logits[requests]).int(),
    )
    return StepCase(*(_moved(part, device) for part in case))


def compare(kernel: str, name: str, step: StepCase) -> Measurement:
    """Return how much of what a kernel writes is not what its twin writes."""
    ours, twin = (step.inputs(kernel) for _ in range(2))
    for function, (arguments, _) in zip(_KERNELS[kernel], (ours, twin), strict=True):
        function(*arguments)
    return Measurement(kernel, name, share_that_differs(ours[1], twin[1]), 0.0)


def check(device: str) -> Iterator[Measurement]:
    """Yield the errors in small cases."""
    step = random_step(37, 9, device, num_layers=2)
    for kernel in _KERNELS:
        yield compare(kernel, "37 requests of 9 nodes", step)


def measure(batch_sizes: Sequence[int], num_nodes: int) -> Iterator[Measurement]:
    """Yield errors and times at a model's shape, on the GPU."""
    for batch_size in batch_sizes:
        step = random_step(batch_size, num_nodes, "cuda", hidden_size=_HIDDEN_SIZE, dtype=torch.bfloat16)
        for kernel, functions in _KERNELS.items():
            arguments, _ = step.inputs(kernel)
            ms, stock_ms = (graph_time.time_ms([call(function, *arguments)]) for function in functions)
            name = f"batch {batch_size} {num_nodes} nodes"
            yield compare(kernel, name, step)._replace(ms=ms, stock_ms=stock_ms)


def _unsigned(word: int) -> int:
    return word & ((1 << 64) - 1)


def _moved(part: Any, device: str) -> Any:
    if isinstance(part, tuple):
        return type(part)(*(_moved(each, device) for each in part))
    return None if part is None else part.to(device)
