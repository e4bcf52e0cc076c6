"""Text piece by piece: the tokens of `decoding.generate_step`, decoded, in mlx-lm's responses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse, generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_port.decoding import generate_step
from mlx_port.drafter import ReDrafter
from mlx_port.plan import Plan
from mlx_port.target import Target
from mlx_port.telemetry import Telemetry


@dataclass
class Response(GenerationResponse):
    """mlx-lm's response, and how the drafter did."""

    accepted_length: int = 0
    """Drafts accepted by the verification that this token comes from."""


def stream_generate(
    target: Target,
    tokenizer: Any,
    prompt: str | mx.array | list[int],
    drafter: ReDrafter,
    *,
    beam_width: int | None = None,
    draft_length: int | None = None,
    tree_budget: int | None = None,
    max_tokens: int = 256,
    telemetry: Telemetry | None = None,
    **step_options: Any,
) -> Generator[Response, None, None]:
    """Yield the text piece by piece, in responses that carry mlx-lm's fields with the same meaning.

    Args:
        beam_width: beams searched; this and the next two are the drafter's own by default.
        draft_length: tokens drafted per beam.
        tree_budget: most tree nodes verified per step, 1..63.
        max_tokens: -1 for no limit.
        step_options: `decoding.generate_step`'s other arguments.

    Raises:
        ValueError: as `decoding.generate_step` does, or a number of the plan is out of range.
    """
    plan = Plan.of(drafter, target.mode, beam_width, draft_length, tree_budget)
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    token_ids = _encode(tokenizer, prompt)
    telemetry = telemetry or Telemetry()
    steps = generate_step(
        token_ids, target, drafter, plan=plan, max_tokens=max_tokens, telemetry=telemetry, **step_options
    )
    detokenizer = tokenizer.detokenizer
    # closed in any case: only then have the caches read what was yielded, and no more
    with wired_limit(target.model, [generation_stream]), contextlib.closing(steps):
        start = time.perf_counter()
        prompt_seconds = 0.0
        for count, (token_id, log_probs, from_draft) in enumerate(steps, start=1):
            if count == 1:
                prompt_seconds = time.perf_counter() - start
                start = time.perf_counter()
            is_end = token_id in tokenizer.eos_token_ids
            is_last = is_end or count == max_tokens
            if not is_end:
                detokenizer.add_token(token_id)
            if is_last:
                detokenizer.finalize()
            yield Response(
                text=detokenizer.last_segment,
                token=token_id,
                logprobs=log_probs,
                from_draft=from_draft,
                prompt_tokens=token_ids.size,
                prompt_tps=token_ids.size / prompt_seconds,
                generation_tokens=count,
                generation_tps=count / (time.perf_counter() - start),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=("stop" if is_end else "length") if is_last else None,
                accepted_length=telemetry.accepted_lengths[-1] if telemetry.accepted_lengths else 0,
            )
            if is_last:
                return


def _encode(tokenizer: Any, prompt: str | mx.array | list[int]) -> mx.array:
    if isinstance(prompt, str):
        # a chat template writes the first token itself
        has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        prompt = tokenizer.encode(prompt, add_special_tokens=not has_bos)
    return prompt if isinstance(prompt, mx.array) else mx.array(prompt)
