"""Whose draws a draft may know under model runner V2: those that the noise of `kernels.sampling_noise` decides alone.

Without a seed a request is given one by vLLM, so it is foreseen as well. Noise in fp64 is another. A request that
leaves tokens out (top-k, top-p, min-p) is drafted without noise: to find what a drafter would leave out, every depth
would have to rank its vocabulary, and FlashInfer, which may serve such requests, draws otherwise.
"""

from __future__ import annotations

from typing import Any


def has_keyed_noise(sampler: Any) -> bool:
    """Return whether vLLM's sampler draws with the noise that we know of."""
    return not sampler.use_fp64_gumbel
