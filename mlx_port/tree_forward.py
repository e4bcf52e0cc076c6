"""One forward of a stock mlx-lm model over a token tree.

The model's own code runs; three things make it see a tree instead of a text. The caches are replaced by views
(`cache.TreeView`), which give it one position per node and the tree's mask. `mx.fast.rope`, which takes one offset per
sequence, is called for the time of the forward with the nodes as sequences, if there is one offset per node; stock
MLX refuses that call, so no other is touched. And the model's head is listened to: what it is given is the
last hidden state in every architecture, whatever is done with its output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from mlx_port import cache
from mlx_port.cache import Caches, Layout, RowsView, TreeView
from mlx_port.token_tree import TokenTree


class Mode(Enum):
    """How a model is shown a tree."""

    TREE = "tree"
    """One sequence of nodes."""
    ROWS = "rows"
    """A batch of nodes: attention reads the context once per node."""
    CHAIN = "chain"
    """Trees of one path only, as a text."""
    REPLAY = "replay"
    """The same, and what was accepted of it is read again: for layers whose state cannot be cut short."""

    @property
    def takes_chains_only(self) -> bool:
        """Whether a tree must be one path."""
        return self in (Mode.CHAIN, Mode.REPLAY)


class Seen(NamedTuple):
    """What the target makes of the tokens that it was shown."""

    head: nn.Module
    """The layer that made the logits: a linear one, or the embedding."""
    hidden: mx.array  # [tokens, hidden_size]: the input of the head, so after the final norm
    logits: mx.array  # [tokens, vocab]: of the token that comes next


def forward(model: nn.Module, heads: Sequence[nn.Module], tree: TokenTree, caches: Caches, mode: Mode) -> Seen:
    """Return what the model makes of root and nodes, whose keys and values are appended to the caches.

    Args:
        heads: the layers of the model that may be its head.
    """
    token_ids = mx.array(tree.token_ids)
    if len(tree.token_ids) == 1 or mode is Mode.REPLAY:
        return _forward(model, heads, token_ids[None], caches)
    layout = Layout(tree, cache.num_cached(caches))
    if mode is Mode.CHAIN:
        return _forward(model, heads, token_ids[None], cache.views(caches, layout, cache.chain_view))
    if mode is Mode.ROWS:
        return _forward(model, heads, token_ids[:, None], cache.views(caches, layout, RowsView))
    with _position_per_node():
        return _forward(model, heads, token_ids[None], cache.views(caches, layout, TreeView))


def _forward(model: nn.Module, heads: Sequence[nn.Module], token_ids: mx.array, caches: Caches) -> Seen:
    with _listening(heads) as heard:
        logits = model(token_ids, cache=caches)
    # a soft cap or a scale may still follow the head, another head cannot
    head, hidden = heard[-1]
    return Seen(head, hidden.reshape(-1, hidden.shape[-1]), logits.reshape(-1, logits.shape[-1]))


@contextlib.contextmanager
def _listening(heads: Sequence[nn.Module]) -> Iterator[list[tuple[nn.Module, mx.array]]]:
    """Yield a list to which every call of a head adds the head and its input."""
    heard: list[tuple[nn.Module, mx.array]] = []
    kinds = [type(head) for head in heads]
    try:
        for head, kind in zip(heads, kinds, strict=True):
            # Python looks a call up on the class, and an object in the layer's place would hide its parameters
            head.__class__ = _listener(kind, heard)
        yield heard
    finally:
        for head, kind in zip(heads, kinds, strict=True):
            head.__class__ = kind


def _listener(kind: type, heard: list[tuple[nn.Module, mx.array]]) -> type:
    # a tied head is the embedding read backwards
    method = "as_linear" if hasattr(kind, "as_linear") else "__call__"
    stock: Any = getattr(kind, method)

    def listen(self: nn.Module, x: mx.array) -> mx.array:
        heard.append((self, x))
        return stock(self, x)

    return type(kind.__name__, (kind,), {method: listen})


@contextlib.contextmanager
def _position_per_node() -> Iterator[None]:
    """Let `mx.fast.rope` take one offset per token of a single sequence."""
    stock = mx.fast.rope

    def rope(x: mx.array, dims: int, *, offset: Any, **options: Any) -> mx.array:  # x: [1, ..., tokens, head_dim]
        per_token = isinstance(offset, mx.array) and offset.ndim == 1 and len(x) == 1 and offset.size == x.shape[-2]
        if not per_token or offset.size == 1:
            return stock(x, dims, offset=offset, **options)
        return stock(x.swapaxes(0, -2), dims, offset=offset, **options).swapaxes(0, -2)

    try:
        mx.fast.rope = rope
        yield
    finally:
        mx.fast.rope = stock
