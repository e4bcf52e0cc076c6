"""The noise that sampling adds, known before the target has been asked.

A token is drawn at temperature T as the argmax of `logits / T + g`, where g is Gumbel noise, one number per token of
the vocabulary. Here g is a function of a seed and the token, and the seeds come from the request's generator, one per
emitted token. So the noise of the next tokens is settled before the target runs, and a copy of the generator tells it:
a drafter that adds `T g` to its own logits ranks first what the target will draw wherever the two agree well enough.
The text stays what it is, because the target's logits and the noise alone decide it. (A test of probability ratios,
which other speculation accepts by, would be biased by shared noise; there is none here.)

That two parties draw the same token most often when they share their noise: Daliri, Musco and Suresh, "Coupling without
Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978. The function of seed and token is that of
vLLM's sampler on CPUs: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over a key made of the seed, so a seed means the
same here and there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_LAST_SHIFT = 31
_RANDOM_BITS = 53
_NUM_SEEDS = 1 << 31
_MOST_RANKED = 256
"""Best tokens that are ranked to find the last one that is kept: to sort a whole vocabulary costs more than a draft."""


def draw_seeds(generator: torch.Generator | None, num_tokens: int) -> torch.Tensor:
    """Return the seeds of the next tokens, [num_tokens] int64, from a generator on the CPU (None: torch's own)."""
    return torch.randint(_NUM_SEEDS, (num_tokens,), generator=generator)


def foresee_seeds(generator: torch.Generator, num_tokens: int) -> torch.Tensor:
    """Return what `draw_seeds` will, [num_tokens] int64, and leave the generator as it is."""
    return draw_seeds(generator.clone_state(), num_tokens)


def gumbel(seeds: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the noise that a seed gives each token, [..., tokens] fp32.

    Args:
        seeds: [...], int64.
        token_ids: [tokens], int64, of the target.
    """
    bits = _mixed(_mixed(seeds)[..., None] + (token_ids + 1) * _GAMMA)
    uniform = (_shifted(bits, 64 - _RANDOM_BITS).double().add_(0.5)).mul_(0.5**_RANDOM_BITS)
    return uniform.log_().neg_().log_().neg_().float()


def leaves_tokens_out(parameters: Any) -> bool:
    """Return whether a request with such parameters, of vLLM's names and meanings, draws from some tokens only."""
    return bool(parameters.top_k > 0 or parameters.top_p < 1 or parameters.min_p > 0)


class Truncation(NamedTuple):
    """How requests sample: their temperatures, and which tokens they leave out before a token is drawn."""

    temperatures: torch.Tensor  # [requests]
    top_k: torch.Tensor  # [requests] int64: tokens kept, 0 for all
    top_p: torch.Tensor  # [requests]: probability kept, 1 for all
    min_p: torch.Tensor  # [requests]: probability over the best one's below which tokens are left out, 0 for none
    is_active: bool
    """Whether any request leaves tokens out."""

    @classmethod
    def of(cls, parameters: Sequence[Any]) -> Truncation:
        """Return what sampling parameters with vLLM's names and meanings ask for."""
        return cls(
            torch.tensor([each.temperature for each in parameters]),
            torch.tensor([max(0, each.top_k) for each in parameters]),
            torch.tensor([each.top_p for each in parameters]),
            torch.tensor([each.min_p for each in parameters]),
            any(leaves_tokens_out(each) for each in parameters),
        )

    def among(self, rows: torch.Tensor, num_requests: int) -> Truncation:
        """Return it for `num_requests` requests, of which these stand in `rows`; the others are greedy."""

        def spread(column: torch.Tensor, neutral: float) -> torch.Tensor:
            return column.new_full((num_requests,), neutral).index_copy_(0, rows, column)

        return Truncation(
            spread(self.temperatures, 0.0),
            spread(self.top_k, 0),
            spread(self.top_p, 1.0),
            spread(self.min_p, 0.0),
            self.is_active,
        )

    def lift(self, logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return logits that rank first what will be drawn, [requests, beams, tokens].

        What the drafter would keep competes with noise, and is lifted or lowered until its best stands where the best
        logit stood; the rest competes with its logits alone. So a truncation that leaves one token is drafted as
        greedy text is, and one that leaves all tokens by their noise.

        Args:
            logits: [requests, beams, tokens] fp32: the drafter's.
            noise: [requests, 1, tokens]: times the temperature.
        """
        noisy = logits + noise
        if not self.is_active:
            return noisy
        kept = self._kept(logits)
        best = noisy.masked_fill(~kept, float("-inf")).amax(dim=-1, keepdim=True)
        return torch.where(kept, noisy - best + logits.amax(dim=-1, keepdim=True), logits)

    def _kept(self, logits: torch.Tensor) -> torch.Tensor:
        """Return which tokens the drafter would keep, [requests, beams, tokens] bool."""
        temperatures, top_k, top_p, min_p = (column[:, None, None] for column in self[:4])
        best = logits.topk(min(logits.shape[-1], _MOST_RANKED), dim=-1).values
        ranks = torch.arange(best.shape[-1], device=best.device)
        probs = (best / temperatures - (logits / temperatures).logsumexp(dim=-1, keepdim=True)).exp()
        is_kept = (probs.cumsum(dim=-1) - probs < top_p) & (probs >= min_p * probs[..., :1])
        is_kept &= (top_k == 0) | (ranks < top_k)
        num_kept = is_kept.sum(dim=-1, keepdim=True).clamp(min=1)
        last = best.gather(-1, num_kept - 1)
        # where all that were ranked are kept, those behind them may be
        return logits >= last.masked_fill(num_kept == best.shape[-1], float("-inf"))


class NoisySampler:
    """Draws tokens at a temperature, and tells what it will add to the logits of the next ones.

    Args:
        temperature: above 0.
        seed: of the generator.

    Raises:
        ValueError: the temperature is not above 0.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, but it must be above 0: greedy decoding needs no sampler")
        self.temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:  # [rows, vocab] -> [rows]
        """Return one token per row."""
        seeds = draw_seeds(self._generator, len(logits)).to(logits.device)
        noise = gumbel(seeds, torch.arange(logits.shape[-1], device=logits.device))
        return (logits.float() / self.temperature + noise).argmax(dim=-1)

    def foresee(self, num_tokens: int, token_ids: torch.Tensor) -> torch.Tensor:
        """Return what the next draws add to logits, [num_tokens, tokens] fp32; nothing is drawn.

        Args:
            token_ids: [tokens], int64: those that it is wanted for.
        """
        seeds = foresee_seeds(self._generator, num_tokens).to(token_ids.device)
        return self.temperature * gumbel(seeds, token_ids)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """Return SplitMix64's permutation of 64-bit words; products wrap."""
    for shift, factor in _FACTORS:
        bits = (bits ^ _shifted(bits, shift)).mul_(factor)
    return bits ^ _shifted(bits, _LAST_SHIFT)


def _shifted(bits: torch.Tensor, shift: int) -> torch.Tensor:
    """Return words shifted to the right, zeros coming in: torch has signed words alone."""
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)
