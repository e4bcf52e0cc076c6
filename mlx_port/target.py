"""A target: a model of mlx-lm that can verify drafts, and how.

Which way a model takes a tree is not looked up but tried, once, when it is loaded: a small tree is compared with its
paths read one by one. A model that gets the tree wrong takes its nodes as a batch, or else chains.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_port import cache, token_tree, tree_forward
from mlx_port.cache import Caches
from mlx_port.drafter import Embed, ReDrafter
from mlx_port.token_tree import TokenTree
from mlx_port.tree_forward import Mode, Seen

logger = logging.getLogger(__name__)

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "tok_embeddings", "word_embeddings", "embedding", "embeddings")
_INNER = ("language_model", "model", "transformer", "backbone")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
# what a model's code may raise when it is shown offsets that it does not expect
_MISFITS = (ValueError, TypeError, RuntimeError, IndexError, AttributeError, NotImplementedError)


class Target:
    """A model of mlx-lm with what drafting needs to know about it.

    Args:
        recurrent: whether to take models with recurrent layers. Of their drafts, what was accepted is read a second
            time, which costs about a forward per step: it pays where most of a short chain is accepted.

    Raises:
        NotImplementedError: the model keeps something that cannot be rolled back, or reads no tree and no chain.
    """

    def __init__(self, model: nn.Module, recurrent: bool = False) -> None:
        self.model = model
        self.name = getattr(model, "model_type", type(model).__name__)
        owners = _owners(model)
        self._embedding = _embedding(owners, self.name)
        rows = len(self._embedding.weight)
        linear = [
            child
            for owner in owners
            for child in owner.children().values()
            if isinstance(child, nn.Linear | nn.QuantizedLinear) and len(child.weight) == rows
        ]
        self.heads: list[nn.Module] = [*linear, self._embedding]
        self.embed: Embed = self._embedding
        self.max_length = _max_length(model)
        self.searches: dict[Any, Callable[..., Any]] = {}
        """Compiled beam searches, kept here because they hold this target's embedding."""
        self.mode, self._head = self._probe(recurrent)
        probe = self.embed(mx.array([0]))
        self.dtype: mx.Dtype = probe.dtype
        self.vocab_size, self.hidden_size = rows, probe.shape[-1]

    def make_caches(self, max_kv_size: int | None = None) -> Caches:
        """Return empty caches, as mlx-lm makes them."""
        return make_prompt_cache(self.model, max_kv_size)

    def look(self, tree: TokenTree, caches: Caches) -> Seen:
        """Return what the model makes of a tree; its nodes are appended to the caches."""
        return tree_forward.forward(self.model, self.heads, tree, caches, self.mode)

    def lend(self, drafter: ReDrafter) -> None:
        """Let a drafter without a head use the target's.

        Raises:
            ValueError: the drafter was made for another target.
        """
        differences = [
            f"{name} {ours} where the target has {theirs}"
            for name, ours, theirs in (
                ("hidden_size", drafter.config.hidden_size, self.hidden_size),
                ("vocab_size", drafter.config.vocab_size, self.vocab_size),
            )
            if ours != theirs
        ]
        if differences:
            origin = f" (trained for {drafter.config.verifier!r})" if drafter.config.verifier else ""
            raise ValueError(
                f"the drafter{origin} does not fit this {self.name} target: it has {' and '.join(differences)}; "
                "pass a drafter that was trained for this target"
            )
        if drafter.config.tie_lm_head:
            drafter.tie_head(self._head)

    def _probe(self, recurrent: bool) -> tuple[Mode, nn.Module]:
        """Return the first mode in which the model reads a tree as it reads its paths, and the model's head."""
        caches = self.make_caches()
        modes = [Mode.TREE, Mode.ROWS, Mode.CHAIN]
        if kinds := cache.unsupported(caches):
            if not cache.is_recurrent(caches):
                raise NotImplementedError(
                    f"{self.name} is not supported: it keeps {', '.join(sorted(kinds))}, which cannot forget rejected "
                    "drafts; run it with mlx_lm alone"
                )
            if not recurrent:
                raise NotImplementedError(
                    f"{self.name} has recurrent layers, where drafting seldom pays: "
                    "ask for it with recurrent=True (--recurrent), or run it with mlx_lm alone"
                )
            if "ssm_update" in vars(sys.modules[type(self.model).__module__]) and not _sums_over_one_token_work():
                raise NotImplementedError(
                    f"{self.name} is not supported here: MLX {mx.__version__} may leave its sums over one token "
                    "unwritten on a CPU, with and without a drafter; update mlx to 0.32.2 or later"
                )
            modes = [Mode.REPLAY]
        reasons: list[str] = []
        for mode in modes:
            try:
                fault, head = _fault(self.model, self.heads, mode)
            except _MISFITS as error:
                fault, head = f"{type(error).__name__}: {error}", self._embedding
            if fault is None:
                if mode is Mode.CHAIN:
                    logger.warning("%s decodes chains only, as %s", self.name, "; ".join(reasons))
                return mode, head
            reasons.append(f"mode {mode.value!r} fails its test at load ({fault})")
        raise NotImplementedError(f"{self.name} is not supported: {'; '.join(reasons)}; run it with mlx_lm alone")


def _sums_over_one_token_work() -> bool:
    """Return whether `cumsum` writes its result where the axis has one element and strides beyond it.

    mlx-lm's state space models take such sums for every token. Up to MLX 0.32.1, on CPUs, what comes back is what the
    allocator last kept there, unless it reuses the memory of the input: github.com/ml-explore/mlx/pull/4139.
    """
    row = mx.arange(1.0, 5.0).reshape(1, 4)
    mx.eval(row)
    padded = row[:, 1:]  # [1, 3], with the stride of four
    mx.eval(padded)
    found = mx.cumsum(padded, axis=0)
    return bool(mx.array_equal(found, padded))


_CONTEXT = [1, 2, 3, 4, 5]
# two of the leaves share a parent, and every token differs from its neighbours in the layout
_TREE = token_tree.best_nodes(6, [7, 1, 3, 5, 2], [-1, 0, 0, -1, 3], [-1.0, -2.0, -3.0, -4.0, -5.0], 5)
# a model that reads the tree as a text is off by the whole of what the tree changes
_TOLERANCE = 1 / 8


def _fault(model: nn.Module, heads: list[nn.Module], mode: Mode) -> tuple[str | None, nn.Module]:
    """Return what is wrong with a model's reading of a small tree in a mode, or None, and its head."""
    tree = token_tree.chain(_TREE.path(2)) if mode.takes_chains_only else _TREE
    leaves = sorted(set(range(len(tree.token_ids))) - set(tree.parents))
    alone = [_read(model, heads, token_ids) for token_ids in map(tree.path, leaves)]
    as_text = _read(model, heads, tree.token_ids)
    caches = make_prompt_cache(model)
    model(mx.array([_CONTEXT]), cache=caches)
    seen = tree_forward.forward(model, heads, tree, caches, mode)

    if seen.logits.shape != as_text.shape:
        return f"logits of shape {seen.logits.shape} where {as_text.shape} was expected", seen.head
    expected = mx.stack([_of(tree, node, leaves, alone) for node in range(len(tree.token_ids))])
    error = float(mx.abs(seen.logits.astype(mx.float32) - expected).max())
    scale = float(mx.abs(as_text - expected).max())
    if mode.takes_chains_only:
        scale = float(mx.abs(expected).max())
    # not "error > ...": NaN is a fault too
    if not error <= _TOLERANCE * scale:
        return f"its logits are off by {error:.3g} where reading the tree as a text is off by {scale:.3g}", seen.head
    return None, seen.head


def _read(model: nn.Module, heads: list[nn.Module], token_ids: list[int]) -> mx.array:
    """Return the logits after each of these tokens, read as a text behind the context, [tokens, vocab]."""
    logits = model(mx.array([_CONTEXT + token_ids]), cache=make_prompt_cache(model))
    return logits[0, len(_CONTEXT) :].astype(mx.float32)


def _of(tree: TokenTree, node: int, leaves: list[int], alone: list[mx.array]) -> mx.array:
    """Return a node's logits in the first path that holds it."""
    index = next(i for i, leaf in enumerate(leaves) if tree.ancestors[leaf] >> node & 1)
    return alone[index][tree.depths[node]]


def _owners(model: nn.Module) -> list[nn.Module]:
    """Return the model and the modules nested in it that may hold embedding and head, the outermost first."""
    owners = [model]
    while (inner := next((owners[-1][name] for name in _INNER if name in owners[-1]), None)) is not None:
        owners.append(inner)
    return owners


def _embedding(owners: list[nn.Module], name: str) -> Any:
    for owner in reversed(owners):
        for key in _EMBEDDINGS:
            if key in owner and isinstance(owner[key], nn.Embedding | nn.QuantizedEmbedding):
                return owner[key]
    raise NotImplementedError(f"{name} is not supported: its token embedding was not found; run it with mlx_lm alone")


def _max_length(model: nn.Module) -> int | None:
    """Return the number of positions that the model knows, or None where its configuration does not say."""
    arguments: Any = getattr(model, "args", None)
    for holder in (arguments, getattr(arguments, "text_config", None)):
        for name in _LENGTHS:
            value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if value is not None:
                return int(value)
    return None
