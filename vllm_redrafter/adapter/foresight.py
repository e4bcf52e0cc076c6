"""What vLLM's sampler will add to the logits of the next tokens: noise that drafts may know (`core.noise`).

The sampler takes a seed per row and call from the request's generator, and a walk calls it once per depth, so a copy of
the generator tells the seeds of the next step's depths. A generator must serve one request alone, and each of its
numbers one token: were some skipped because of what was made of them, those left would be a selection, and the text
would no longer have the target's distribution. So requests without a seed are given generators too (`own_generator`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.sampling_params import SamplingType

from vllm_redrafter.core.noise import Truncation, foresee_seeds, gumbel
from vllm_redrafter.kernels.cpu_beam_search import Draws

_TRIED_DRAWS = 8
_TRIED_TOKENS = 256
_NUM_SEEDS = 2**63 - 1
_MOST_NUMBERS = 1 << 17
"""Up to so many, an operation on them costs little more than on a few: a request's depths are then looked at in one."""


def is_possible(sampler: Any) -> bool:
    """Return whether vLLM's sampler draws with the noise that we know of: it does not in fp64, or on other processors.

    It is asked for draws from a flat distribution, where the noise alone decides.
    """
    generator = torch.Generator().manual_seed(0)
    expected = gumbel(foresee_seeds(generator, _TRIED_DRAWS), torch.arange(_TRIED_TOKENS)).argmax(dim=-1)
    flat = torch.zeros(1, _TRIED_TOKENS)
    with torch.random.fork_rng(devices=[]):
        drawn = [sampler.topk_topp_sampler(flat.clone(), {0: generator}, None, None)[0] for _ in range(_TRIED_DRAWS)]
    return torch.equal(torch.cat(drawn), expected)


class KnownDraws:
    """A `Foresight` of the requests of a batch that sample.

    Args:
        rows: those requests, by their places among the ones drafted for.
        seeds: [requests, depths], int64.
        truncation: how they sample.
        token_ids: [tokens], those that the drafter's head knows.
    """

    def __init__(self, rows: list[int], seeds: torch.Tensor, truncation: Truncation, token_ids: torch.Tensor) -> None:
        self._rows = rows
        self._seeds = seeds
        self._truncation = truncation
        self._token_ids = token_ids
        self._num_together = max(1, min(seeds.shape[1], _MOST_NUMBERS // (len(rows) * len(token_ids))))
        self._first = -1
        self._noise = torch.empty(0)  # [requests, depths, tokens], from depth `_first` on

    def __call__(self, depth: int, logits: torch.Tensor) -> torch.Tensor:
        """Return the drafter's logits, [batch, beams, tokens], so that they rank first what will be drawn."""
        sampled = logits if len(self._rows) == len(logits) else logits[self._rows]
        place = depth % self._num_together
        if depth - place != self._first:
            self._first = depth - place
            self._noise = self._noise_of(slice(self._first, self._first + self._num_together))
        drawn = self._truncation.lift(sampled, self._noise[:, place, None])
        return drawn if sampled is logits else logits.index_copy(0, torch.tensor(self._rows), drawn)

    def of_batch(self, num_requests: int) -> Draws:
        """Return it for a batch of so many, in which the others are greedy."""
        if len(self._rows) == num_requests:
            return Draws(self._seeds, self._truncation)
        places = torch.tensor(self._rows)
        seeds = self._seeds.new_zeros(num_requests, self._seeds.shape[1]).index_copy_(0, places, self._seeds)
        return Draws(seeds, self._truncation.among(places, num_requests))

    def _noise_of(self, depths: slice) -> torch.Tensor:  # [requests, depths, tokens]
        temperatures = self._truncation.temperatures[:, None, None]
        return gumbel(self._seeds[:, depths], self._token_ids).mul_(temperatures)


def own_generator() -> torch.Generator:
    """Return a generator for a request without a seed; torch's own decides how it begins."""
    return torch.Generator().manual_seed(int(torch.randint(_NUM_SEEDS, ())))


def of(
    generators: Mapping[int, torch.Generator],
    parameters: Mapping[int, Any],
    num_tokens: int,
    token_ids: torch.Tensor,  # [tokens]
) -> KnownDraws | None:
    """Return what is known of some requests' next draws, or None where all of them are greedy.

    Args:
        generators: by place in the batch; every request that samples has one.
        parameters: how those requests sample, by place in the batch.
        num_tokens: to look ahead.
        token_ids: those that the drafter's head knows.
    """
    sampled = {
        row: place for row, (place, each) in enumerate(parameters.items()) if each.sampling_type != SamplingType.GREEDY
    }
    if not sampled:
        return None
    seeds = torch.stack([foresee_seeds(generators[place], num_tokens) for place in sampled.values()])
    truncation = Truncation.of([parameters[place] for place in sampled.values()])
    return KnownDraws(list(sampled), seeds, truncation, token_ids)
