"""What every kernel needs of GPUs that need not be there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from vllm_redrafter.bench.tree_batches import random_batch
from vllm_redrafter.core.beam_search import Candidates
from vllm_redrafter.kernels import (
    best_continuations,
    commit_kv,
    count_walks,
    draft_starts,
    draft_trees,
    elementwise,
    sampling_noise,
    store_trees,
    tree_attention,
    tree_positions,
    verify_walk,
)
from vllm_redrafter.kernels.batch import (
    COUNTED,
    HEAD_SIZES,
    AttentionOptions,
    DraftStarts,
    PaddedTrees,
    RequestStates,
    StepRows,
)
from vllm_redrafter.kernels.binary import Binary, compile_launch
from vllm_redrafter.kernels.caches import layer_caches
from vllm_redrafter.kernels.gpu import Gpu
from vllm_redrafter.kernels.launch import Launch

_LONG = 1 << 16
"""A context that is split."""


class Compiled(NamedTuple):
    """A kernel as one kind of GPU runs it."""

    kernel: str
    case: str
    capability: int
    binary: Binary


def compile_all(capability: int) -> Iterator[Compiled]:
    """Yield every kernel, in the cases that models and trees make of it."""
    for case, launch in _cases(Gpu(capability)):
        name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
        yield Compiled(name, case, capability, compile_launch(launch, capability))


def _cases(gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    # rows of all heads of a group: one fills a tile, one the smallest, one many
    for num_rows, group in ((17, 4), (5, 1), (64, 8)):
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            yield from _attention(gpu, 128, num_rows, group, dtype)
    for head_size in HEAD_SIZES:
        if head_size != 128:
            yield from _attention(gpu, head_size, 17, 4, torch.bfloat16)
    yield from _attention(gpu, 128, 17, 4, torch.bfloat16, sliding_window=4096)
    yield from _attention(gpu, 256, 17, 4, torch.bfloat16, sliding_window=4096, soft_cap=50.0)

    batch = random_batch([20], [17], num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    for path in (5, 17):
        yield (
            f"paths of {path}",
            commit_kv.plan(layer_caches([batch.cache]), batch.trees, torch.zeros(1, path, dtype=torch.int64)),
        )
    ids, starts = torch.zeros(1, 17, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    yield "16 nodes", verify_walk.plan_walk(ids[0], ids, starts[:1], starts, ids[0])
    yield from _step(16)
    yield from _step(63)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.zeros(1, 128_000, dtype=dtype)
        yield (
            str(dtype).removeprefix("torch."),
            verify_walk.plan_draw(logits, ids[0, :1], starts[:1], torch.zeros(1), ids[0, :1]),
        )
    yield (
        "32k tokens",
        sampling_noise.plan(ids[0, :1], torch.zeros(1), ids[0, :1], torch.zeros(32_000, dtype=torch.int64)),
    )
    states = torch.zeros(1, 4, 4096, dtype=torch.bfloat16)
    for name, sums_first in (("silu of sum", True), ("plus silu", False)):
        yield name, elementwise.plan(states, states, sums_first=sums_first)
    for num_beams, num_tokens, num_kept in ((1, 32_000, 16), (4, 32_000, 16), (64, 128_000, 63)):
        logits, noise = torch.zeros(1, num_beams, num_tokens, dtype=torch.bfloat16), torch.zeros(1, num_tokens)
        for launch in best_continuations.plan(logits, logits[..., 0].float(), num_kept, noise):
            yield f"{num_kept} of {num_beams} x {num_tokens // 1000}k", launch
    for num_nodes, num_candidates in ((16, 80), (63, 630)):
        column = torch.zeros(1, num_candidates, dtype=torch.int64)
        candidates = Candidates(column, column, column.float())
        yield (
            f"{num_nodes} of {num_candidates}",
            draft_trees.plan(ids[0, :1], candidates, torch.zeros(1, dtype=torch.bool), _trees(num_nodes)),
        )


def _step(num_nodes: int) -> Iterator[tuple[str, Launch]]:
    """Yield what a step of model runner V2 has done besides: small kernels for many smaller ones."""
    case, trees, numbers = f"{num_nodes} nodes", _trees(num_nodes), torch.zeros(1, dtype=torch.int32)
    starts, ids = torch.zeros(2, dtype=torch.int32), trees.token_ids
    sums = torch.zeros(len(COUNTED) + num_nodes, dtype=torch.int64)
    yield case, count_walks.plan(ids, trees.parents, numbers, starts, sums)
    yield case, store_trees.plan(trees, numbers, numbers, trees)
    yield case, tree_positions.plan(numbers, numbers, ids[0, :1], trees.depths, ids[0])
    rows = StepRows(numbers, starts, ids[0, :1], ids[0], numbers, ids)
    states = RequestStates(ids[:, :1], torch.zeros(1), ids[0, :1], numbers, numbers)
    hidden = torch.zeros(1, 4096, dtype=torch.bfloat16)
    for layers in (0, 3):
        outputs = hidden.repeat(1, layers) if layers else None
        out = DraftStarts.zeros(1, (1 + layers) * 4096, hidden.dtype, hidden.device)
        yield f"{case}, {layers} layers", draft_starts.plan(hidden, outputs, rows, states, False, out)


def _trees(num_nodes: int) -> PaddedTrees:
    return PaddedTrees.zeros(1, num_nodes, torch.device("cpu"))


def _attention(
    gpu: Gpu,
    head_size: int,
    num_rows: int,
    group: int,
    cache_dtype: torch.dtype,
    *,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> Iterator[tuple[str, Launch]]:
    batch = random_batch(
        [20], [num_rows], num_heads=2 * group, num_kv_heads=2, head_size=head_size, dtype=torch.bfloat16
    )
    batch = batch._replace(cache=batch.cache.to(cache_dtype), trees=batch.trees._replace(max_seq_len=_LONG))
    scale = torch.ones(1) if cache_dtype == torch.float8_e4m3fn else None
    options = AttentionOptions(head_size**-0.5, soft_cap, sliding_window, scale, scale)
    case = f"{num_rows} rows x {group} heads of {head_size}"
    case += ", fp8" if scale is not None else ""
    case += ", window" if sliding_window else ""
    case += ", soft cap" if soft_cap else ""
    for launch in tree_attention.plan(*batch.inputs, options, torch.empty_like(batch.query), gpu):
        yield case, launch
