"""The loop, one text at a time, with one wait for the device per step.

    read     the prompt; its last token is the first root, of a tree without nodes
    verify   one forward of the target over root and nodes; the walk; the beam search from where the walk ends; copies
             of the accepted rows of the caches: all in one graph, and then the one wait
    commit   keep keys and values of the accepted path, emit its tokens
    draft    lay the best candidates out as the next tree

Every token is drawn by the target with the caller's own sampler, so the text is the one that `mlx_lm.generate_step`
gives; only the number of forwards differs. When the caller stops, wherever that is, or an error or a Ctrl-C breaks a
step off, the caches have read the prompt and exactly the tokens that were yielded, as mlx-lm leaves its own.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Sequence

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from mlx_port import cache, token_tree
from mlx_port.cache import Caches
from mlx_port.calibration import Pace
from mlx_port.drafter import ReDrafter
from mlx_port.plan import Plan
from mlx_port.target import Target
from mlx_port.telemetry import Telemetry
from mlx_port.text import KVQuantization, LogitsProcessor, Sampler, Text, Verified

logger = logging.getLogger(__name__)

_CLEAR_EVERY = 256
_NUM_KEPT = 4
"""First tokens that mlx-lm's rotating caches never drop."""


def generate_step(
    prompt: mx.array,  # [tokens]
    target: Target,
    drafter: ReDrafter,
    *,
    plan: Plan | None = None,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    max_kv_size: int | None = None,
    prompt_cache: Caches | None = None,
    prefill_step_size: int = 2048,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    telemetry: Telemetry | None = None,
    pace: Pace | None = None,
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """Yield tokens, each with its log-probabilities [vocab] and whether it was drafted.

    They are the tokens that `mlx_lm.generate.generate_step` yields, and arguments with its names mean the same.

    Args:
        plan: the drafter's own by default.
        max_tokens: -1 for no limit.
        logits_processors: called for every node with the tokens up to it: they must not keep a state of their own.
        prompt_cache: of the target alone, as mlx-lm makes, saves and loads them; updated in place.
        telemetry: counters to add to.
        pace: stops drafting, with a warning, where that turns out slower than mlx-lm alone.

    Raises:
        ValueError: the prompt is empty or longer than the target's context, or a number is out of range.
    """
    token_ids = _check(prompt, max_tokens, prefill_step_size, max_kv_size)
    caches = target.make_caches(max_kv_size) if prompt_cache is None else prompt_cache
    _check_length(len(token_ids), cache.num_cached(caches), target)
    if kv_bits is not None and any(isinstance(layer, RotatingKVCache) for layer in caches):
        raise ValueError(
            f"kv_bits is {kv_bits}, but mlx-lm does not quantise rotating caches, which sliding windows and "
            "max_kv_size need: leave it out"
        )
    plan = plan or Plan.of(drafter, target.mode)
    if target.mode.takes_chains_only and plan.shape.width > 1:
        raise ValueError(
            f"the beam width is {plan.shape.width}, but the {target.name} target decodes chains only: make it 1"
        )
    telemetry = telemetry or Telemetry()
    quantization = KVQuantization(kv_bits, kv_group_size, quantized_kv_start)
    text = Text(target, drafter, plan, caches, quantization, sampler, logits_processors or ())
    report = prompt_progress_callback or (lambda done, total: None)

    report(0, len(token_ids))
    for start in range(0, len(token_ids) - 1, prefill_step_size):
        text.read(token_ids[start : min(start + prefill_step_size, len(token_ids) - 1)])
        mx.eval([layer.state for layer in caches])
        report(len(text.history), len(token_ids))
        mx.clear_cache()
    text.unread = token_ids[-1:]
    tree = token_tree.chain(text.unread)
    num_left = max_tokens
    with contextlib.closing(text):
        while True:
            start_seconds = time.perf_counter()
            verified = text.verify(tree)
            step_seconds = time.perf_counter() - start_seconds
            if num_left == max_tokens:
                report(len(token_ids), len(token_ids))
            _count(telemetry, verified)
            for token_id, node in zip(verified.token_ids, verified.nodes, strict=True):
                num_left -= 1
                telemetry.emitted_token_count += 1
                text.num_emitted += 1
                yield token_id, verified.log_probs[node], text.num_emitted < len(verified.nodes)
                if num_left == 0:
                    return
            text.commit()
            if telemetry.target_model_call_count % _CLEAR_EVERY == 0:
                mx.clear_cache()
            if pace is not None and len(tree.token_ids) > 1:
                pace.add(len(verified.token_ids), step_seconds)
                if pace.gain is not None and pace.gain < 1:
                    logger.warning("drafting runs at %.2f times the speed of mlx-lm alone: it stops", pace.gain)
                    break
            tree = text.draft(verified)
        for token_id, log_probs in text.undrafted(num_left):
            telemetry.target_model_call_count += 1
            telemetry.emitted_token_count += 1
            text.num_emitted += 1
            yield token_id, log_probs, False


def _check(prompt: mx.array, max_tokens: int, prefill_step_size: int, max_kv_size: int | None) -> list[int]:
    """Return the prompt's tokens."""
    if prompt.ndim != 1 or prompt.size == 0:
        raise ValueError(f"the prompt has shape {prompt.shape}, but it must be one text of at least 1 token")
    if max_tokens < 1 and max_tokens != -1:
        raise ValueError(f"max_tokens is {max_tokens}, but it must be 1 or more, or -1 for no limit")
    if prefill_step_size < 1:
        raise ValueError(f"prefill_step_size is {prefill_step_size}, but it must be 1 or more")
    if max_kv_size is not None and max_kv_size <= _NUM_KEPT:
        raise ValueError(
            f"max_kv_size is {max_kv_size}, but mlx-lm always keeps {_NUM_KEPT} tokens: make it more, or leave it out"
        )
    token_ids: list[int] = prompt.tolist()
    return token_ids


def _check_length(num_tokens: int, num_cached: int, target: Target) -> None:
    if target.max_length is not None and num_cached + num_tokens > target.max_length:
        behind = f" behind {num_cached} cached ones" if num_cached else ""
        raise ValueError(
            f"the prompt has {num_tokens} tokens{behind}, but the {target.name} target's context holds "
            f"{target.max_length}: shorten it"
        )


def _count(telemetry: Telemetry, verified: Verified) -> None:
    num_drafts, num_accepted = len(verified.tree.token_ids) - 1, len(verified.nodes) - 1
    telemetry.target_model_call_count += 1
    telemetry.target_verified_token_count += 1 + num_drafts
    telemetry.draft_model_call_count += 1
    if num_drafts:
        telemetry.round_count += 1
        telemetry.draft_token_count += num_drafts
        telemetry.accepted_draft_token_count += num_accepted
        telemetry.accepted_lengths.append(num_accepted)
