"""A drafter's head shared out over the ranks of tensor parallelism: each scores its own rows, and all choose alike.

Most of what a draft costs is its head. At every depth a rank sends, for each beam, its best tokens and its share of the
softmax's denominator, in one small all-gather. What comes back is the same on all ranks, and so is what they make of
it: ranks that drafted different trees would verify different trees.

A head tied to the target's is shared out alike, in rows of our own: vLLM divides the target's vocabulary, padded, and
knows nothing of the drafted part of it. Every rank keeps the whole head of a drafter with `top_k` (Apple's models),
since what is left out before the softmax depends on all rows, and a head with fewer rows per rank than are kept.

Under model runner V1 every rank keeps the whole head: what is foreseen of truncated sampling there ranks all of it.
"""

from __future__ import annotations

import torch
from vllm.distributed import tensor_model_parallel_all_gather

from vllm_redrafter.core.beam_search import Continuations, with_noise
from vllm_redrafter.core.config import ReDrafterConfig


def rows_of_rank(config: ReDrafterConfig, num_kept: int, rank: int, num_ranks: int) -> range | None:
    """Return the rows of a drafter's head that a rank scores, or None where every rank scores all.

    Args:
        num_kept: continuations that a search keeps per depth: every rank has at least so many rows, for they may all
            be one rank's.
    """
    size = config.head_size
    if num_ranks == 1 or config.top_k is not None or size // num_ranks < num_kept:
        return None
    return range(size * rank // num_ranks, size * (rank + 1) // num_ranks)


def best_of_all_ranks(
    logits: torch.Tensor,  # [batch, beams, rows]: of this rank's rows of the head
    scores: torch.Tensor,  # [batch, beams]: cumulative log-probabilities
    num_kept: int,
    noise: torch.Tensor | None,  # [batch, rows] fp32
    scale: float,
    *,
    first_row: int,
) -> Continuations:
    """Return the best `num_kept` continuations, on every rank what `best_continuations` makes of the whole head.

    Where continuations are equally good, the first beam's is the better one, then the lowest draft id. Among equals
    within one rank `topk` decides which are sent, as it decides within the whole head.
    """
    logits = with_noise(logits, noise, scale)
    rows = logits.topk(num_kept, dim=-1, sorted=False).indices.sort(dim=-1).values
    share = logits.logsumexp(dim=-1, keepdim=True)
    # a float holds every draft id: vocabularies are far smaller than 2^24
    sent = torch.cat((logits.gather(-1, rows), share, (first_row + rows).float()), dim=-1)
    received = tensor_model_parallel_all_gather(sent, dim=-1).unflatten(-1, (-1, sent.shape[-1]))
    best, shares, draft_ids = received.split((num_kept, 1, num_kept), dim=-1)  # [batch, beams, ranks, ...]
    totals = best - shares.logsumexp(dim=-2, keepdim=True) + scores[..., None, None]
    # ranks follow each other as their rows do, so a stable sort leaves equals in the order of the whole head
    found = totals.flatten(1).sort(dim=-1, descending=True, stable=True)
    places = found.indices[:, :num_kept]
    return Continuations(
        places // totals.shape[2:].numel(), draft_ids.flatten(1).gather(1, places).long(), found.values[:, :num_kept]
    )
