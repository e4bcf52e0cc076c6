"""Whose noise a draft may know under model runner V2: that which vLLM keys by seed, position and token.

A request without a seed is given one by vLLM, so it is foreseen as well. Two samplers draw otherwise: Gumbel noise in
fp64, and FlashInfer's, which may serve requests with top-k or top-p and without a seed. Their requests are drafted
without noise; a wrong guess costs acceptance, never output.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Foresight(NamedTuple):
    """What an engine's sampler lets a draft know."""

    is_keyed: bool = False
    """Whether noise is keyed at all as `kernels.sampling_noise` computes it."""
    may_fuse: bool = False
    """Whether another sampler may serve what has top-k or top-p."""

    @classmethod
    def of(cls, sampler: Any) -> Foresight:
        """Return what vLLM's sampler lets know."""
        return cls(not sampler.use_fp64_gumbel, sampler.use_flashinfer or sampler.use_xpu_sampler)

    def covers(self, parameters: Any) -> bool:
        """Return whether a request's noise is known."""
        is_truncated = parameters.top_k > 0 or parameters.top_p < 1
        return self.is_keyed and not (self.may_fuse and is_truncated and parameters.seed is None)
