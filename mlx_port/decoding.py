"""The loop, one text at a time, with one wait for the device per step.

    read     the prompt; its last token is the first root, of a tree without nodes
    verify   one forward of the target over root and nodes; the walk; the beam search from where the walk ends; copies
             of the accepted rows of the caches: all in one graph, and then the one wait
    commit   keep keys and values of the accepted path, emit its tokens
    draft    lay the best candidates out as the next tree

Every token is drawn by the target with the caller's own sampler, so the text is the one that `mlx_lm.generate_step`
gives; only the number of forwards differs. When the caller stops, wherever that is, the caches have read the prompt and
exactly the tokens that were yielded, as mlx-lm leaves its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache

from mlx_port import acceptance, beam_search, cache, token_tree
from mlx_port.beam_search import BeamShape, Candidates
from mlx_port.cache import Caches, Rows
from mlx_port.config import check_num_nodes
from mlx_port.drafter import ReDrafter
from mlx_port.target import Target
from mlx_port.telemetry import Telemetry
from mlx_port.token_tree import TokenTree
from mlx_port.tree_forward import Mode

Sampler = Callable[[mx.array], mx.array]
"""Draws one token per row of log-probabilities, [rows, vocab] -> [rows]."""

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""Returns changed logits, [1, vocab], given all tokens so far, [tokens], and the logits."""

_CLEAR_EVERY = 256


@dataclass(frozen=True)
class Plan:
    """How much is drafted and verified."""

    shape: BeamShape
    """Beams to search."""
    num_nodes: int
    """Most tree nodes verified per step, 1..63."""

    @classmethod
    def of(
        cls,
        drafter: ReDrafter,
        mode: Mode,
        beam_width: int | None = None,
        draft_length: int | None = None,
        tree_budget: int | None = None,
    ) -> Plan:
        """Return the drafter's own plan, or what was asked for; a target of chains gets chains.

        Raises:
            ValueError: a number is out of range.
        """
        config = drafter.config
        shape = BeamShape(
            config.beam_width if beam_width is None else beam_width,
            config.draft_length if draft_length is None else draft_length,
        )
        for name, value in (("beam width", shape.width), ("draft length", shape.length)):
            if value < 1:
                raise ValueError(f"the {name} is {value}, but it must be 1 or more")
        num_nodes = config.num_speculative_tokens if tree_budget is None else tree_budget
        check_num_nodes(num_nodes)
        return cls(BeamShape(1, shape.length) if mode is Mode.CHAIN else shape, num_nodes)

    @property
    def num_candidates(self) -> int:
        """Candidates kept per depth: a width of 1 asks for a chain, with more the runners-up count too."""
        return self.num_nodes if self.shape.width > 1 else 1


class KVQuantization(NamedTuple):
    """How mlx-lm quantises a cache while it grows."""

    bits: int | None = None
    group_size: int = 64
    start: int = 5000
    """Tokens in the cache from which on it is quantised."""


class _Verified(NamedTuple):
    """A verification, evaluated."""

    tree: TokenTree
    token_ids: list[int]  # accepted tokens, then the bonus token
    nodes: list[int]  # root, accepted nodes: token i was drawn at nodes[i]
    log_probs: mx.array  # [1 + N, vocab]
    candidates: tuple[list[int], list[int], list[float]]  # of the continuations of the bonus token
    copies: list[Rows]


class _Text:
    """One text in the making."""

    def __init__(
        self,
        target: Target,
        drafter: ReDrafter,
        plan: Plan,
        caches: Caches,
        quantization: KVQuantization,
        sampler: Sampler | None,
        processors: Sequence[LogitsProcessor],
    ) -> None:
        self.target, self.caches, self.quantization = target, caches, quantization
        self.plan, self.sampler, self.processors = plan, sampler, processors
        self.history: list[int] = []  # tokens before the root
        self.search = _compiled_search(target, drafter, plan)

    def read(self, token_ids: list[int]) -> None:
        """Append tokens to the caches; nothing waits for it."""
        with mx.stream(generation_stream):
            self.target.model(mx.array(token_ids)[None], cache=self.caches)
            self._quantize()
        self.history += token_ids

    def verify(self, tree: TokenTree) -> _Verified:
        """Look at root and nodes, accept, and search on from there."""
        size = len(tree.token_ids)
        with mx.stream(generation_stream):
            seen = self.target.look(tree, self.caches)
            log_probs, choices = self._draw(tree, seen.logits)
            walk = acceptance.walk(tree, choices)
            end = walk.num_accepted
            candidates = Candidates(*self.search(seen.hidden[walk.nodes[end]], walk.token_ids[end]))
            copies = cache.gather(self.caches, size, walk.nodes)
            # the one wait of a step
            mx.eval(walk, candidates, copies)
        count = walk.num_accepted.item() + 1
        return _Verified(
            tree,
            walk.token_ids.tolist()[:count],
            walk.nodes.tolist()[:count],
            log_probs,
            tuple(column.tolist() for column in candidates),
            copies,
        )

    def commit(self, verified: _Verified, num_emitted: int) -> None:
        """Keep the root and the nodes of the first `num_emitted` tokens; the bonus token has no node yet."""
        nodes = verified.nodes[: 1 + num_emitted]
        with mx.stream(generation_stream):
            cache.commit(self.caches, len(verified.tree.token_ids), nodes, verified.copies)
            self._quantize()
        self.history += [verified.tree.token_ids[node] for node in nodes]

    def draft(self, verified: _Verified) -> TokenTree:
        """Return the next tree, no deeper than the target has positions."""
        past = cache.num_cached(self.caches)
        limits = [self.plan.shape.length]
        if self.target.max_length is not None:
            limits.append(max(0, self.target.max_length - 1 - past))
        if self.quantization.bits is not None and past < self.quantization.start:
            # the token that fills the cache up to `start` is the last that sees it unquantised
            limits.append(self.quantization.start - 1 - past)
        return token_tree.best_nodes(verified.token_ids[-1], *verified.candidates, self.plan.num_nodes, min(limits))

    def _draw(self, tree: TokenTree, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Return log-probabilities [1 + N, vocab] and a token of the target [1 + N] at every node."""
        nodes = range(len(tree.token_ids))
        if self.processors:
            logits = mx.concatenate([self._processed(tree, node, logits[node : node + 1]) for node in nodes])
        log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if self.sampler is None:
            return log_probs, mx.argmax(log_probs, axis=-1)
        # node by node: a sampler may toss one coin per call, as XTC does
        return log_probs, mx.concatenate([self.sampler(log_probs[node : node + 1]) for node in nodes])

    def _processed(self, tree: TokenTree, node: int, logits: mx.array) -> mx.array:
        tokens = mx.array(self.history + tree.path(node))
        for processor in self.processors:
            logits = processor(tokens, logits)
        return logits

    def _quantize(self) -> None:
        quantization = self.quantization
        maybe_quantize_kv_cache(self.caches, quantization.start, quantization.group_size, quantization.bits)


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
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """Yield tokens, each with its log-probabilities [vocab] and whether it was drafted.

    They are the tokens that `mlx_lm.generate.generate_step` yields, and arguments with its names mean the same.

    Args:
        plan: the drafter's own by default.
        max_tokens: -1 for no limit.
        logits_processors: called for every node with the tokens up to it: they must not keep a state of their own.
        prompt_cache: of the target alone, as mlx-lm makes, saves and loads them; updated in place.
        telemetry: counters to add to.

    Raises:
        ValueError: the prompt is empty or longer than the target's context, or a number is out of range.
    """
    token_ids = _check(prompt, max_tokens, prefill_step_size)
    caches = target.make_caches(max_kv_size) if prompt_cache is None else prompt_cache
    _check_length(len(token_ids), cache.num_cached(caches), target)
    plan = plan or Plan.of(drafter, target.mode)
    telemetry = telemetry or Telemetry()
    quantization = KVQuantization(kv_bits, kv_group_size, quantized_kv_start)
    text = _Text(target, drafter, plan, caches, quantization, sampler, logits_processors or ())
    report = prompt_progress_callback or (lambda done, total: None)

    report(0, len(token_ids))
    for start in range(0, len(token_ids) - 1, prefill_step_size):
        text.read(token_ids[start : min(start + prefill_step_size, len(token_ids) - 1)])
        mx.eval([layer.state for layer in caches])
        report(len(text.history), len(token_ids))
        mx.clear_cache()
    tree = token_tree.chain(token_ids[-1:])
    num_left = max_tokens
    while True:
        verified = text.verify(tree)
        if num_left == max_tokens:
            report(len(token_ids), len(token_ids))
        _count(telemetry, verified)
        num_emitted, is_over = 0, True
        try:
            for token_id, node in zip(verified.token_ids, verified.nodes, strict=True):
                num_emitted += 1
                num_left -= 1
                telemetry.emitted_token_count += 1
                yield token_id, verified.log_probs[node], num_emitted < len(verified.nodes)
                if num_left == 0:
                    return
            is_over = False
        finally:
            text.commit(verified, num_emitted)
            if is_over and num_emitted == len(verified.nodes):
                text.read(verified.token_ids[-1:])
        if telemetry.target_model_call_count % _CLEAR_EVERY == 0:
            mx.clear_cache()
        tree = text.draft(verified)


def _check(prompt: mx.array, max_tokens: int, prefill_step_size: int) -> list[int]:
    """Return the prompt's tokens."""
    if prompt.ndim != 1 or prompt.size == 0:
        raise ValueError(f"the prompt has shape {prompt.shape}, but it must be one text of at least 1 token")
    if max_tokens < 1 and max_tokens != -1:
        raise ValueError(f"max_tokens is {max_tokens}, but it must be 1 or more, or -1 for no limit")
    if prefill_step_size < 1:
        raise ValueError(f"prefill_step_size is {prefill_step_size}, but it must be 1 or more")
    token_ids: list[int] = prompt.tolist()
    return token_ids


def _check_length(num_tokens: int, num_cached: int, target: Target) -> None:
    if target.max_length is not None and num_cached + num_tokens > target.max_length:
        behind = f" behind {num_cached} cached ones" if num_cached else ""
        raise ValueError(
            f"the prompt has {num_tokens} tokens{behind}, but the {target.name} target's context holds "
            f"{target.max_length}: shorten it"
        )


def _count(telemetry: Telemetry, verified: _Verified) -> None:
    num_drafts, num_accepted = len(verified.tree.token_ids) - 1, len(verified.nodes) - 1
    telemetry.target_model_call_count += 1
    telemetry.target_verified_token_count += 1 + num_drafts
    telemetry.draft_model_call_count += 1
    if num_drafts:
        telemetry.round_count += 1
        telemetry.draft_token_count += num_drafts
        telemetry.accepted_draft_token_count += num_accepted
        telemetry.accepted_lengths.append(num_accepted)


def _compiled_search(target: Target, drafter: ReDrafter, plan: Plan) -> Callable[[mx.array, mx.array], Any]:
    """Return the beam search as a function of hidden state and root: compiled once, as its shapes never change."""
    key = (id(drafter), plan)
    if key not in target.searches:

        def search(hidden: mx.array, init_id: mx.array) -> tuple[mx.array, ...]:
            # a plain tuple: MLX knows no NamedTuple
            return tuple(beam_search.search(drafter, target.embed, hidden, init_id, plan.shape, plan.num_candidates))

        target.searches[key] = mx.compile(search)
    return target.searches[key]
