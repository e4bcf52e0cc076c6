"""Requests whose distribution depends on the tokens drafted before a row: they draft chains.

vLLM's kernels for these options count all rows of a request before a row as its text. In a chain that is so.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState, use_penalty


def is_linear(parameters: Any) -> bool:
    """Return whether a request with these `SamplingParams` must draft a chain."""
    return bool(
        parameters.structured_outputs is not None
        or use_penalty(parameters)
        or parameters.bad_words
        or parameters.thinking_token_budget is not None
    )


def has_unknown_processors(sampler: Any) -> bool:
    """Return whether a sampler of vLLM holds logits processors that are not its own, which may count rows too."""
    known = (BadWordsState, LogitBiasState, PenaltiesState)
    return not all(isinstance(processor, known) for processor in sampler.logits_processors)
