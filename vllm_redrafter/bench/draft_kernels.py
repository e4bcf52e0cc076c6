"""The kernels that a draft is made of, and whole drafts, against their twins and the clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vllm_redrafter.bench import drafts, graph_time
from vllm_redrafter.bench.measurement import TOLERANCES, VOCAB_SIZE, Measurement, call, share_that_differs
from vllm_redrafter.core import beam_search
from vllm_redrafter.core.beam_search import SHARPNESS, BeamShape, Candidates
from vllm_redrafter.kernels import best_continuations, draft_trees, elementwise, reference, sampling_noise
from vllm_redrafter.kernels.batch import PaddedTrees

_DRAFT_VOCAB_SIZE = 32_000
_HIDDEN_SIZE = 4096
_EXIT_DIMS = (1024, 4096)
_SHAPE = BeamShape(width=4, length=5)


def check(device: str, dtype: torch.dtype) -> Iterator[Measurement]:
    """Yield the errors in small cases."""
    yield _noise("5000 tokens", *_noise_case(8, 5000, device))
    yield from _elementwise("3 x 1000", *_states_case(3, 1000, dtype, device))
    yield _choice("16 of 3 x 5000", *_choice_case(2, 3, 5000, 16, dtype, device))
    yield _trees("16 of 80", *_trees_case(8, 16, device))


def measure(batch_sizes: Sequence[int], num_nodes: int, bytes_per_ms: float) -> Iterator[Measurement]:
    """Yield errors and times at a model's shape, on the GPU."""
    for batch_size in batch_sizes:
        yield _timed_noise(f"batch {batch_size} {_DRAFT_VOCAB_SIZE} tokens", batch_size, bytes_per_ms)
        yield from _timed_elementwise(f"batch {batch_size} hidden size {_HIDDEN_SIZE}", batch_size)
        yield _timed_choice(
            f"batch {batch_size} {num_nodes} of {_SHAPE.width} x {_DRAFT_VOCAB_SIZE}",
            batch_size,
            num_nodes,
            bytes_per_ms,
        )
        yield _timed_trees(f"batch {batch_size} {num_nodes} nodes", batch_size, num_nodes)
    for exit_dim in _EXIT_DIMS:
        yield from _timed_drafts(exit_dim, batch_sizes, num_nodes, bytes_per_ms)


def _noise_case(num_rows: int, num_tokens: int, device: str) -> tuple[torch.Tensor, ...]:
    rows = torch.arange(num_rows, device=device)
    return (
        100 + rows,
        torch.full((num_rows,), 0.7, device=device),
        rows << 33,
        3 * torch.arange(num_tokens, device=device),
    )


def _noise(case: str, *rows: Any) -> Measurement:
    ours, twin = sampling_noise.sampling_noise(*rows), reference.sampling_noise(*rows)
    return Measurement(
        "sampling_noise", case, float((ours - twin).abs().max() / twin.abs().max()), TOLERANCES[twin.dtype]
    )


def _timed_noise(case: str, num_rows: int, bytes_per_ms: float) -> Measurement:
    rows = _noise_case(num_rows, _DRAFT_VOCAB_SIZE, "cuda")
    # a copy reads and writes; this writes alone
    num_bytes = num_rows * _DRAFT_VOCAB_SIZE * torch.float32.itemsize
    ms = graph_time.time_ms([call(sampling_noise.sampling_noise, *rows)])
    return _noise(case, *rows)._replace(ms=ms, floor_ms=num_bytes / bytes_per_ms)


def _states_case(num_rows: int, hidden_size: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x, y = 3 * torch.randn(2, num_rows, hidden_size, generator=generator, device=device)
    return x.to(dtype), y.to(dtype)


def _elementwise(case: str, x: torch.Tensor, y: torch.Tensor) -> Iterator[Measurement]:
    for name in ("silu_of_sum", "plus_silu"):
        ours, twin = getattr(elementwise, name)(x, y), getattr(reference, name)(x.float(), y.float())
        yield Measurement(name, case, float((ours - twin).abs().max() / twin.abs().max()), TOLERANCES[x.dtype])


def _timed_elementwise(case: str, batch_size: int) -> Iterator[Measurement]:
    x, y = _states_case(batch_size * _SHAPE.width, _HIDDEN_SIZE, torch.bfloat16, "cuda")
    for measured in _elementwise(case, x, y):
        ms, stock_ms = (
            graph_time.time_ms([call(getattr(module, measured.kernel), x, y)]) for module in (elementwise, reference)
        )
        yield measured._replace(ms=ms, stock_ms=stock_ms)


def _choice_case(
    batch_size: int, num_beams: int, num_tokens: int, num_kept: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor, float]:
    generator = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(batch_size, num_beams, num_tokens, generator=generator, device=device)
    noise = torch.randn(batch_size, num_tokens, generator=generator, device=device)
    scores = -torch.rand(batch_size, num_beams, generator=generator, device=device)
    return logits.to(dtype), scores, num_kept, noise, SHARPNESS


def _choice(case: str, *depth: Any) -> Measurement:
    ours, twin = best_continuations.best_continuations(*depth), reference.best_continuations(*depth)
    # not the tokens: two that all but tie may change places
    error = (ours.log_probs - twin.log_probs).abs().max() / twin.log_probs.abs().max()
    return Measurement("best_continuations", case, float(error), TOLERANCES[torch.float32])


def _timed_choice(case: str, batch_size: int, num_kept: int, bytes_per_ms: float) -> Measurement:
    depth = _choice_case(batch_size, _SHAPE.width, _DRAFT_VOCAB_SIZE, num_kept, torch.bfloat16, "cuda")
    logits, _, _, noise, _ = depth
    num_bytes = logits.numel() * logits.element_size() + noise.numel() * noise.element_size()
    return _choice(case, *depth)._replace(
        ms=graph_time.time_ms([call(best_continuations.best_continuations, *depth)]),
        floor_ms=num_bytes / bytes_per_ms,
        stock_ms=graph_time.time_ms([call(beam_search.best_continuations, *depth)]),
    )


def _trees_case(
    num_requests: int, num_nodes: int, device: str
) -> tuple[torch.Tensor, Candidates, torch.Tensor, PaddedTrees]:
    candidates = drafts.random_candidates(num_requests, _SHAPE, num_nodes, device)
    requests = torch.arange(num_requests, device=device)
    return requests, candidates, requests % 4 == 3, PaddedTrees.zeros(num_requests, num_nodes, requests.device)


def _trees(
    case: str, init_ids: torch.Tensor, candidates: Candidates, is_linear: torch.Tensor, ours: PaddedTrees
) -> Measurement:
    twin = PaddedTrees(*map(torch.zeros_like, ours))
    draft_trees.draft_trees(init_ids, candidates, is_linear, ours)
    reference.draft_trees(init_ids, candidates, is_linear, twin)
    return Measurement("draft_trees", case, share_that_differs(ours, twin), 0.0)


def _timed_trees(case: str, num_requests: int, num_nodes: int) -> Measurement:
    search = _trees_case(num_requests, num_nodes, "cuda")
    return _trees(case, *search)._replace(
        ms=graph_time.time_ms([call(draft_trees.draft_trees, *search)]),
        stock_ms=graph_time.time_ms([call(reference.draft_trees, *search)]),
    )


def _timed_drafts(
    exit_dim: int, batch_sizes: Sequence[int], num_nodes: int, bytes_per_ms: float
) -> Iterator[Measurement]:
    """Yield what whole drafts take, from hidden states to trees; the floor reads every weight once per depth.

    There is no twin to differ from: the search is the core's.
    """
    drafter = drafts.random_drafter(_HIDDEN_SIZE, exit_dim, VOCAB_SIZE, _DRAFT_VOCAB_SIZE, "cuda", torch.bfloat16)
    num_bytes = sum(weight.numel() * weight.element_size() for weight in drafter.parameters())
    floor_ms = _SHAPE.length * num_bytes / bytes_per_ms
    for batch_size in batch_sizes:
        ms = graph_time.time_ms([drafts.draft_call(drafter, batch_size, _SHAPE, num_nodes)])
        yield Measurement("draft", f"batch {batch_size} exit {exit_dim}", 0.0, 0.0, ms, floor_ms)
