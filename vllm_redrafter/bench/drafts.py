"""Whole drafts of a large target's shape, by a drafter of random weights: what one costs does not depend on them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_redrafter import kernels
from vllm_redrafter.adapter.v2 import drafting
from vllm_redrafter.core import beam_search
from vllm_redrafter.core.beam_search import BeamShape, Candidates
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.kernels.batch import DraftStarts, PaddedTrees


def random_drafter(
    hidden_size: int,
    exit_dim: int,
    vocab_size: int,
    draft_vocab_size: int,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> ReDrafter:
    """Return a drafter as it is served, its draft vocabulary the first tokens."""
    config = ReDrafterConfig(hidden_size, vocab_size, exit_dim, draft_vocab_size=draft_vocab_size)
    with torch.device(device):
        drafter = ReDrafter(config).to(dtype).requires_grad_(False)
        drafter.set_draft_vocabulary(torch.arange(draft_vocab_size))
    drafter.use(kernels.elementwise_of_backend())
    return drafter


def random_candidates(num_requests: int, shape: BeamShape, num_kept: int, device: str) -> Candidates:
    """Return what searches of a small drafter find."""
    drafter = random_drafter(32, 32, 1000, 500, device)
    with torch.device(device):
        table, hidden = torch.randn(1000, 32), torch.randn(num_requests, 32)
        return beam_search.search(drafter, lambda ids: table[ids], hidden, torch.arange(num_requests), shape, num_kept)


def draft_call(drafter: ReDrafter, num_requests: int, shape: BeamShape, num_nodes: int) -> Callable[[], object]:
    """Return a call that drafts trees for sampled requests, as model runner V2 has it done: the noise is foreseen."""
    config, weight = drafter.config, next(drafter.parameters())
    with torch.device(weight.device):
        table = torch.randn(config.vocab_size, config.hidden_size, dtype=weight.dtype)
        requests = torch.arange(num_requests)
        starts = DraftStarts(
            torch.randn(num_requests, config.hidden_size, dtype=weight.dtype),
            init_ids=requests,
            is_linear=torch.zeros(num_requests, dtype=torch.bool),
            positions=requests,
            temperatures=torch.full((num_requests,), 0.7),
            seeds=requests,
        )
    trees = PaddedTrees.zeros(num_requests, num_nodes, weight.device)
    drafted_ids = drafter.drafted_ids(weight.device)

    def embed(token_ids: torch.Tensor) -> torch.Tensor:
        return table[token_ids]

    def noise(depth: int) -> torch.Tensor:
        return kernels.backend().sampling_noise(starts.positions, starts.temperatures, starts.seeds, drafted_ids, depth)

    return lambda: drafting.draft(drafter, embed, starts, shape, trees, noise)
