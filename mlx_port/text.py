"""One text in the making: the target's caches, the tokens so far, and the steps that both take together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import generate_step as stock_generate_step
from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache

from mlx_port import acceptance, beam_search, cache, token_tree
from mlx_port.beam_search import Candidates
from mlx_port.cache import Appended, Caches, Snapshot
from mlx_port.drafter import ReDrafter
from mlx_port.plan import Plan
from mlx_port.target import Target
from mlx_port.token_tree import TokenTree
from mlx_port.tree_forward import Mode

Sampler = Callable[[mx.array], mx.array]
"""Draws one token per row of log-probabilities, [rows, vocab] -> [rows]."""

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""Returns changed logits, [1, vocab], given all tokens so far, [tokens], and the logits."""


class KVQuantization(NamedTuple):
    """How mlx-lm quantises a cache while it grows."""

    bits: int | None = None
    group_size: int = 64
    start: int = 5000
    """Tokens in the cache from which on it is quantised."""


class Verified(NamedTuple):
    """A verification, evaluated."""

    tree: TokenTree
    token_ids: list[int]  # accepted tokens, then the bonus token
    nodes: list[int]  # root, accepted nodes: token i was drawn at nodes[i]
    log_probs: mx.array  # [1 + N, vocab]
    candidates: tuple[list[int], list[int], list[float]]  # of the continuations of the bonus token
    appended: list[Appended]
    before: Snapshot | None  # where nodes cannot be dropped: what to read the accepted ones again from


class Text:
    """One text in the making; closed, wherever it stands, it leaves the caches to whoever goes on."""

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
        self.unread: list[int] = []  # the root, as long as the caches lack it
        self.num_emitted = 0  # tokens since the last commit, or of mlx-lm's last step
        self._verified: Verified | None = None
        self._ahead: Snapshot | None = None  # the caches before that step
        self.search = _compiled_search(target, drafter, plan)

    def read(self, token_ids: list[int]) -> None:
        """Append tokens, the last that are unread, to the caches; nothing waits for it."""
        with cache.restored_on_failure(self.caches), mx.stream(generation_stream):
            self.target.model(mx.array(token_ids)[None], cache=self.caches)
            self._quantize()
            self.history += token_ids
            self.unread = []

    def verify(self, tree: TokenTree) -> Verified:
        """Look at root and nodes, accept, and search on from there; if that is broken off, no node is left behind."""
        size, replays = len(tree.token_ids), self.target.mode is Mode.REPLAY
        before: Snapshot | None = cache.snapshot(self.caches)
        appended: list[Appended] = []
        try:
            with mx.stream(generation_stream):
                seen = self.target.look(tree, self.caches)
                log_probs, choices = self._draw(tree, seen.logits)
                walk = acceptance.walk(tree, choices)
                end = walk.num_accepted
                candidates = Candidates(*self.search(seen.hidden[walk.nodes[end]], walk.token_ids[end]))
                if not replays:
                    appended = cache.gather(self.caches, size, walk.nodes)
                    # nothing may hold the old buffers while new ones are filled
                    before = None
                # the one wait of a step
                mx.eval(walk, candidates, appended)
            count = walk.num_accepted.item() + 1
            nodes, token_ids = walk.nodes.tolist()[:count], walk.token_ids.tolist()[:count]
            columns = tuple(column.tolist() for column in candidates)
            self.num_emitted = 0
            self._verified = Verified(tree, token_ids, nodes, log_probs, columns, appended, before)
            return self._verified
        except BaseException:
            self._verified = None
            if before is None:
                cache.commit(self.caches, [0], appended)
                self.unread = []
            else:
                cache.restore(self.caches, before)
            raise

    def commit(self) -> None:
        """Keep the root and the nodes of the tokens emitted; the bonus token has no node yet."""
        verified = self._verified
        assert verified is not None
        nodes = verified.nodes[: 1 + self.num_emitted]
        token_ids = [verified.tree.token_ids[node] for node in nodes]
        # up to where the verification is forgotten, all of it can be done again
        with mx.stream(generation_stream):
            if verified.before is None:
                cache.commit(self.caches, nodes, verified.appended)
            elif len(nodes) < len(verified.tree.token_ids):
                cache.restore(self.caches, verified.before)
                # nothing waits for it: it becomes a part of the next step's graph
                self.target.model(mx.array(token_ids)[None], cache=self.caches)
        self.unread = verified.token_ids[-1:] if self.num_emitted == len(verified.nodes) else []
        self._verified = None
        self.history += token_ids
        self._quantize()

    def undrafted(self, max_tokens: int) -> Iterator[tuple[int, mx.array]]:
        """Yield tokens and log-probabilities behind the root as mlx-lm alone decodes them."""
        history = mx.array(self.history)
        steps: Iterator[tuple[int, mx.array]] = stock_generate_step(
            mx.array(self.unread),
            self.target.model,
            max_tokens=max_tokens,
            sampler=self.sampler,
            logits_processors=[partial(_behind, history, processor) for processor in self.processors],
            prompt_cache=self.caches,
            kv_bits=self.quantization.bits,
            kv_group_size=self.quantization.group_size,
            quantized_kv_start=self.quantization.start,
        )
        while True:
            # mlx-lm reads a token before it yields it
            self._ahead, self.num_emitted = cache.snapshot(self.caches), 0
            step = next(steps, None)
            if step is None:
                return
            yield step
            self.unread = []

    def close(self) -> None:
        """Leave the caches as mlx-lm does: they have read all that was emitted, and nothing else."""
        try:
            self._settle()
        except BaseException:
            # a Ctrl-C here of all places
            self._settle()
            raise

    def _settle(self) -> None:
        if self._ahead is not None:
            if self.num_emitted:
                self.unread = []
            else:
                cache.restore(self.caches, self._ahead)
            self._ahead = None
        if self._verified is not None:
            self.commit()
        self._quantize()
        if self.unread:
            self.read(self.unread)

    def draft(self, verified: Verified) -> TokenTree:
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
        with mx.stream(generation_stream):
            maybe_quantize_kv_cache(self.caches, quantization.start, quantization.group_size, quantization.bits)


def _behind(history: mx.array, processor: LogitsProcessor, tokens: mx.array, logits: mx.array) -> mx.array:
    return processor(mx.concatenate((history, tokens.astype(history.dtype))), logits)


def _compiled_search(target: Target, drafter: ReDrafter, plan: Plan) -> Callable[[mx.array, mx.array], Any]:
    """Return the beam search as a function of hidden state and root: its shapes never change, so one compilation does.

    On the CPU it runs as it is: there MLX writes C++ for g++, which takes seconds, and what 0.29 writes crashes.
    """
    key = (id(drafter), plan)
    if key not in target.searches:

        def search(hidden: mx.array, init_id: mx.array) -> tuple[mx.array, ...]:
            # a plain tuple: MLX knows no NamedTuple
            return tuple(beam_search.search(drafter, target.embed, hidden, init_id, plan.shape, plan.num_candidates))

        target.searches[key] = mx.compile(search) if mx.default_device().type == mx.gpu else search
    return target.searches[key]
