"""The kernels against their twins, and on a GPU against the clock.

Times are held against a floor, the bytes that must be moved over the bandwidth that a copy reaches, and against what
stock code takes for the same rows: attention of a chain by vLLM's FlashAttention on the same paged cache, or by torch
on keys and values that lie in one piece where there is no vLLM, a copy per layer instead of one for all, an argmax.
Needs no vLLM: what the core needs, and Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_redrafter.bench import draft_kernels, graph_time, step_kernels, stock
from vllm_redrafter.bench.measurement import TOLERANCES, VOCAB_SIZE, Measurement, call, share_that_differs
from vllm_redrafter.bench.tree_batches import Batch, random_batch, random_parents
from vllm_redrafter.kernels import commit_kv, reference, tree_attention, verify_walk
from vllm_redrafter.kernels.batch import HEAD_SIZES, AttentionOptions
from vllm_redrafter.kernels.caches import layer_caches

_NUM_LAYERS = 32


@dataclass(frozen=True)
class Plan:
    """What is measured on a GPU."""

    batch_sizes: Sequence[int] = (1, 8, 32, 64)
    context_lens: Sequence[int] = (512, 2048, 8192, 32768)
    num_nodes: int = 16
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128


def check(device: str) -> Iterator[Measurement]:
    """Yield the errors of every kernel in small cases with odd shapes; bf16 on GPUs only, the interpreter has none."""
    main_dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for dtype in dict.fromkeys((torch.float32, torch.float16, main_dtype)):
        batch = random_batch([37, 0, 600], [17, 1, 5], num_heads=6, dtype=dtype, device=device)
        yield _attention(_name(dtype), batch)
    yield _attention("window 40", batch, sliding_window=40)
    yield _attention("soft cap 5", batch, soft_cap=5.0)
    for head_size in HEAD_SIZES:
        batch = random_batch([70, 5], [5, 9], head_size=head_size, layout="HND", dtype=main_dtype, device=device)
        yield _attention(f"head size {head_size}", batch)
    batch = random_batch([70, 5], [5, 64], dtype=main_dtype, device=device)
    scales = {"k_scale": torch.tensor([0.5], device=device), "v_scale": torch.tensor([2.0], device=device)}
    yield _attention("fp8 cache", batch._replace(cache=batch.cache.to(torch.float8_e4m3fn)), **scales)
    yield _commit("3 layers", *_commit_case(random_batch([14, 60], [9, 17], device=device), 3))
    yield _walk("63 nodes", 8, 63, device)
    yield _draw("5000 tokens", *_draw_case(8, 5000, device))
    yield from draft_kernels.check(device, main_dtype)
    yield from step_kernels.check(device)


def measure(plan: Plan) -> Iterator[Measurement]:
    """Yield errors and times at a model's shape, on the GPU."""
    bytes_per_ms = graph_time.copy_bytes_per_ms()
    rows = 1 + plan.num_nodes
    for batch_size in plan.batch_sizes:
        for context_len in plan.context_lens:
            for cache_dtype in (torch.bfloat16, torch.float8_e4m3fn):
                case = f"batch {batch_size} context {context_len} {_name(cache_dtype)} cache"
                yield _timed_attention(case, plan, batch_size, context_len, cache_dtype, bytes_per_ms)
        batch = random_batch(
            [100] * batch_size,
            [rows] * batch_size,
            num_kv_heads=plan.num_kv_heads,
            num_heads=plan.num_heads,
            head_size=plan.head_size,
            dtype=torch.bfloat16,
            device="cuda",
        )
        yield _timed_commit(f"batch {batch_size} {_NUM_LAYERS} layers", batch, bytes_per_ms)
        yield _timed_walk(f"batch {batch_size} {plan.num_nodes} nodes", batch_size, plan.num_nodes)
        yield _timed_draw(f"batch {batch_size} {VOCAB_SIZE} tokens", batch_size * rows, bytes_per_ms)
    yield from draft_kernels.measure(plan.batch_sizes, plan.num_nodes, bytes_per_ms)
    yield from step_kernels.measure(plan.batch_sizes, plan.num_nodes)


def _attention(case: str, batch: Batch, **options: Any) -> Measurement:
    layer = AttentionOptions(batch.query.shape[-1] ** -0.5)._replace(**options)
    # what is not written stays nan
    ours = torch.full_like(batch.query, float("nan"))
    tree_attention.tree_attention(*batch.inputs, layer, ours)
    exact = torch.full_like(ours, float("nan"), dtype=torch.float32)
    reference.tree_attention(*batch._replace(query=batch.query.float()).inputs, layer, exact)
    num_rows = int(batch.trees.query_start_loc[-1])
    error = (ours[:num_rows] - exact[:num_rows]).abs().max() / exact[:num_rows].abs().max()
    return Measurement("tree_attention", case, float(error), TOLERANCES[batch.query.dtype])


def _timed_attention(
    case: str, plan: Plan, batch_size: int, context_len: int, cache_dtype: torch.dtype, bytes_per_ms: float
) -> Measurement:
    rows = 1 + plan.num_nodes
    batch = random_batch(
        [context_len] * batch_size,
        [rows] * batch_size,
        num_heads=plan.num_heads,
        num_kv_heads=plan.num_kv_heads,
        head_size=plan.head_size,
        dtype=torch.bfloat16,
        device="cuda",
    )
    batch = batch._replace(cache=batch.cache.to(cache_dtype))
    unit = torch.ones(1, device="cuda")
    scales: dict[str, Any] = {} if cache_dtype == torch.bfloat16 else {"k_scale": unit, "v_scale": unit}
    measured = _attention(case, batch, **scales)

    layer = AttentionOptions(plan.head_size**-0.5)._replace(**scales)
    kv_bytes = batch_size * (context_len + rows) * plan.num_kv_heads * 2 * plan.head_size * cache_dtype.itemsize
    layers = [batch._replace(cache=batch.cache.clone()) for _ in range(graph_time.num_copies(kv_bytes))]
    out = torch.empty_like(batch.query)
    ms = graph_time.time_ms([call(tree_attention.tree_attention, *one.inputs, layer, out) for one in layers])
    del layers
    stock_ms = graph_time.time_ms(stock.chain_attention(batch, kv_bytes))
    num_bytes = kv_bytes + 2 * batch_size * rows * batch.query[0].numel() * batch.query.element_size()
    return measured._replace(ms=ms, floor_ms=num_bytes / bytes_per_ms, stock_ms=stock_ms)


def _commit_case(batch: Batch, num_layers: int) -> tuple[Batch, list[torch.Tensor], torch.Tensor]:
    """Return a batch, caches that differ in every layer, and paths of nodes that all have to move."""
    layers = [batch.cache.nan_to_num() + layer for layer in range(num_layers)]
    path = torch.tensor([0, 2, 4, 5, 8], device=batch.query.device)
    return batch, layers, path.expand(len(batch.trees.seq_lens), -1).contiguous()


def _commit(case: str, batch: Batch, layers: list[torch.Tensor], nodes: torch.Tensor) -> Measurement:
    expected = [layer.clone() for layer in layers]
    commit_kv.commit_kv(layer_caches(layers), batch.trees, nodes)
    reference.commit_kv(layer_caches(expected), batch.trees, nodes)
    return Measurement("commit_kv", case, share_that_differs(layers, expected), 0.0)


def _timed_commit(case: str, batch: Batch, bytes_per_ms: float) -> Measurement:
    batch, layers, nodes = _commit_case(batch, _NUM_LAYERS)
    measured = _commit(case, batch, layers, nodes)
    caches = layer_caches(layers)
    ms = graph_time.time_ms([call(commit_kv.commit_kv, caches, batch.trees, nodes)])

    steps = torch.arange(nodes.shape[1], device="cuda")
    context_lens = (batch.trees.seq_lens - batch.trees.query_start_loc.diff())[:, None]
    block_size = batch.cache.shape[1]

    def slots(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return batch.trees.block_table.gather(1, positions // block_size).long(), positions % block_size

    sources, targets = slots(context_lens + nodes), slots(context_lens + steps)

    def move_by_layer() -> None:
        for layer in layers:
            layer[targets] = layer[sources]

    moved = len(nodes) * (nodes.shape[1] - 1) * len(layers) * batch.cache[0, 0].numel() * batch.cache.element_size()
    return measured._replace(ms=ms, floor_ms=2 * moved / bytes_per_ms, stock_ms=graph_time.time_ms([move_by_layer]))


def _walk_case(num_requests: int, num_nodes: int, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    parents = torch.tensor([random_parents(1 + num_nodes, generator) for _ in range(num_requests)])
    tokens, choices = (torch.randint(3, parents.shape, generator=generator) for _ in range(2))
    starts = torch.arange(0, parents.numel() + 1, 1 + num_nodes, dtype=torch.int32)
    slots = torch.arange(num_requests, dtype=torch.int32)
    return tuple(tensor.to(device) for tensor in (tokens.flatten(), parents, slots, starts, choices.flatten()))


def _walk(case: str, num_requests: int, num_nodes: int, device: str) -> Measurement:
    trees = _walk_case(num_requests, num_nodes, device)
    ours, twin = verify_walk.verify_walk(*trees), reference.verify_walk(*trees)
    return Measurement("verify_walk", case, share_that_differs(ours, twin), 0.0)


def _timed_walk(case: str, num_requests: int, num_nodes: int) -> Measurement:
    trees = _walk_case(num_requests, num_nodes, "cuda")
    ms = graph_time.time_ms([call(verify_walk.verify_walk, *trees)])
    return _walk(case, num_requests, num_nodes, "cuda")._replace(ms=ms)


def _draw_case(num_rows: int, vocab_size: int, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    return (
        torch.randn(num_rows, vocab_size, generator=generator, device=device),
        torch.arange(100, 100 + num_rows, device=device),
        torch.arange(num_rows, dtype=torch.int32, device=device) % 2,
        torch.tensor([0.0, 1.0], device=device),
        torch.tensor([7, 1 << 40], device=device),
    )


def _draw(case: str, *rows: torch.Tensor) -> Measurement:
    different = verify_walk.target_tokens(*rows) != reference.target_tokens(*rows)
    # a GPU's logarithm is not torch's: two tokens that all but tie may change places
    return Measurement("target_tokens", case, float(different.float().mean()), 0.01)


def _timed_draw(case: str, num_rows: int, bytes_per_ms: float) -> Measurement:
    rows = _draw_case(num_rows, VOCAB_SIZE, "cuda")
    logits = rows[0]
    num_bytes = logits.numel() * logits.element_size()
    copies = [logits.clone() for _ in range(graph_time.num_copies(num_bytes))]
    return _draw(case, *rows)._replace(
        ms=graph_time.time_ms([call(verify_walk.target_tokens, copy, *rows[1:]) for copy in copies]),
        floor_ms=num_bytes / bytes_per_ms,
        stock_ms=graph_time.time_ms([call(torch.argmax, copy, 1) for copy in copies]),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
