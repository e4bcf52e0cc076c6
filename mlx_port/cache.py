"""mlx-lm's caches during a verification: what a tree sees of them, and how they keep the accepted path only.

A model asks its cache for three things: the offset (for the positions), the mask, and to append keys and values. A view
answers the first two for a tree and passes the third on, so the model's own code runs unchanged.

Accepted rows are copied out in the graph of the verification and written back after it: a gather from a buffer in the
graph that also writes to it makes MLX copy the whole buffer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache

from mlx_port import token_tree
from mlx_port.token_tree import TokenTree

Caches = list[Any]
"""One cache of mlx-lm per layer."""


class Appended(NamedTuple):
    """Rows that a verification has appended to one cache."""

    offset: int
    """Tokens that the cache had read before."""
    start: int
    """The first of the rows."""
    copies: list[mx.array]
    """Those of the path, array by array, each [..., path, head_dim]."""


class Snapshot(NamedTuple):
    """Where caches stood."""

    layers: list[Any]
    """The caches themselves, as mlx-lm puts others in their place when it quantises them."""
    states: list[dict[str, Any]]
    """The attributes of each, those of a `CacheList` one by one."""


class Layout:
    """Where the nodes of a tree stand behind `num_cached` tokens, and who sees whom."""

    def __init__(self, tree: TokenTree, num_cached: int) -> None:
        self.num_cached = num_cached
        self.positions = mx.array(tree.depths) + num_cached  # [nodes]
        self._ancestors = token_tree.attention_mask(tree)  # [nodes, nodes]
        self._masks: dict[tuple[int | None, int, int | None], mx.array] = {}

    def mask(self, max_size: int | None, keep: int, window: int | None) -> mx.array:
        """Return which node sees which row, [nodes, rows], where a rotating cache holds `max_size` rows.

        Args:
            max_size: None where the cache holds every token.
            keep: first tokens that a rotating cache never drops.
            window: tokens that a node sees, itself included; None for all.
        """
        key = (max_size, keep, window)
        if key not in self._masks:
            self._masks[key] = self._mask(max_size, keep, window)
        return self._masks[key]

    def _mask(self, max_size: int | None, keep: int, window: int | None) -> mx.array:
        past = self.num_cached
        held = mx.arange(past)
        if max_size is not None and past > max_size - 1:
            # mlx-lm makes room for one token before it appends several
            held = mx.concatenate((mx.arange(keep), mx.arange(past - (max_size - 1 - keep), past)))
        rows = mx.concatenate((held, self.positions))  # [rows]: the position of each
        seen = mx.concatenate((mx.ones((len(self.positions), len(held)), mx.bool_), self._ancestors), axis=1)
        distance = self.positions[:, None] - rows
        if max_size is not None:
            seen = seen & ((rows < keep) | (distance < max_size - keep))
        if window is not None:
            seen = seen & (distance < window)
        return seen


class TreeView:
    """Stands in for one layer's cache while a tree is verified as one sequence of nodes."""

    def __init__(self, base: Any, layout: Layout) -> None:
        self.base = base
        self.layout = layout

    @property
    def offset(self) -> Any:
        """The position of every node, [nodes]."""
        return self.layout.positions

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def make_mask(self, num_nodes: int, window_size: int | None = None, return_array: bool = False) -> mx.array:
        """Return the tree's mask, [nodes, rows]; it is always an array."""
        if isinstance(self.base, RotatingKVCache):
            return self.layout.mask(self.base.max_size, self.base.keep, window_size)
        return self.layout.mask(None, 0, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append the nodes' rows, [1, heads, nodes, head_dim], and return all rows."""
        return self.base.update_and_fetch(keys, values)


class RowsView(TreeView):
    """The same where every node is a batch of its own: for models that take one position per sequence."""

    def make_mask(self, num_nodes: int, window_size: int | None = None, return_array: bool = False) -> mx.array:
        """Return the tree's mask, [nodes, 1, 1, rows]."""
        return super().make_mask(num_nodes, window_size, return_array)[:, None, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append the nodes' rows, [nodes, heads, 1, head_dim], and return all rows once per node."""
        fetched = self.base.update_and_fetch(keys.swapaxes(0, 2), values.swapaxes(0, 2))
        return tuple(_repeated(part, len(keys)) for part in fetched)


class ChainView(TreeView):
    """The same where the nodes are one path, to a model that counts positions itself."""

    @property
    def offset(self) -> Any:
        """The position of the root."""
        return self.base.offset


def chain_view(base: Any, layout: Layout) -> Any:
    """Return what to hand to a model that reads nodes as a text.

    mlx-lm's own mask for a text is right but where a cache has wrapped: there, later tokens of a piece lose sight of
    the first rows, which they would see if they came one by one.
    """
    return ChainView(base, layout) if isinstance(base, RotatingKVCache) else base


def _repeated(part: Any, count: int) -> Any:
    if isinstance(part, mx.array):
        return mx.broadcast_to(part, (count, *part.shape[1:]))
    # quantised rows come with scales and biases
    return tuple(_repeated(array, count) for array in part)


def views(caches: Caches, layout: Layout, kind: Callable[[Any, Layout], Any]) -> Caches:
    """Return what to hand to the model in the place of its caches."""
    return [
        CacheList(*views(list(cache.caches), layout, kind)) if isinstance(cache, CacheList) else kind(cache, layout)
        for cache in caches
    ]


def leaves(caches: Sequence[Any]) -> Iterator[Any]:
    """Yield the caches themselves, those of a `CacheList` one by one."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from leaves(cache.caches)
        else:
            yield cache


def unsupported(caches: Caches) -> set[str]:
    """Return the names of the cache classes that cannot hold a tree."""
    return {type(c).__name__ for c in leaves(caches) if type(c) not in (KVCache, QuantizedKVCache, RotatingKVCache)}


def is_recurrent(caches: Caches) -> bool:
    """Return whether some layers keep a state instead of rows, and all can go back to where they were."""
    kinds = [type(cache) for cache in leaves(caches)]
    has_state = any(issubclass(kind, ArraysCache) for kind in kinds)
    return has_state and all(issubclass(kind, ArraysCache) or kind in (KVCache, QuantizedKVCache) for kind in kinds)


def num_cached(caches: Caches) -> int:
    """Return the number of tokens that the caches have read, those that they have dropped since included."""
    return next((cache.offset for cache in leaves(caches) if hasattr(cache, "offset")), 0)


def snapshot(caches: Caches) -> Snapshot:
    """Return where the caches stand, for `restore`, which one call of the model may lie behind.

    Nothing is copied: models replace arrays, or write behind the last row, or over the row that goes next. But the
    arrays live as long as the snapshot, so what is held during an evaluation takes their memory twice.
    """
    return Snapshot(
        list(caches),
        [{name: _own(value) for name, value in vars(cache).items()} for cache in leaves(caches)],
    )


def restore(caches: Caches, kept: Snapshot) -> None:
    """Put caches back to where they stood; what they have read since is forgotten."""
    caches[:] = kept.layers
    for cache, state in zip(leaves(caches), kept.states, strict=True):
        vars(cache).update({name: _own(value) for name, value in state.items()})


def _own(value: Any) -> Any:
    # the arrays of recurrent layers stand in a list, where models exchange them
    return list(value) if isinstance(value, list) else value


@contextlib.contextmanager
def restored_on_failure(caches: Caches) -> Iterator[None]:
    """Put the caches back if what runs inside raises, be it a Ctrl-C between two layers."""
    kept = snapshot(caches)
    try:
        yield
    except BaseException:
        restore(caches, kept)
        raise


def gather(caches: Caches, num_nodes: int, nodes: mx.array) -> list[Appended]:
    """Return the last `num_nodes` rows appended, with copies of those of `nodes` to be evaluated before `commit`."""
    if num_nodes == 1:
        return []
    appended = []
    for cache in leaves(caches):
        end = _end(cache)
        start = end - num_nodes
        copies = [mx.take(array[..., start:end, :], nodes, axis=-2) for array in _arrays(cache)]
        appended.append(Appended(cache.offset - num_nodes, start, copies))
    return appended


def commit(caches: Caches, nodes: Sequence[int], appended: list[Appended]) -> None:
    """Keep, of the rows appended, those of `nodes`, the first of the path that `gather` has copied.

    If it is broken off it can be done again.
    """
    if not appended:
        return
    kept = len(nodes)
    for cache, (offset, start, copies) in zip(leaves(caches), appended, strict=True):
        if list(nodes) != list(range(kept)):
            for array, copied in zip(_arrays(cache), copies, strict=True):
                array[..., start : start + kept, :] = copied[..., :kept, :]
        cache.offset = offset + kept
        if isinstance(cache, RotatingKVCache):
            # its own trim() leaves the rejected rows in, where a later single token would count them as context
            cache.keys = cache.keys[..., : start + kept, :]
            cache.values = cache.values[..., : start + kept, :]
            cache._idx = start + kept


def _end(cache: Any) -> int:
    """Return the row behind the last one appended."""
    return cache._idx if isinstance(cache, RotatingKVCache) else cache.offset


def _arrays(cache: Any) -> list[mx.array]:
    """Return the arrays that hold a cache's rows; assigning to their slices changes the cache."""
    if isinstance(cache, QuantizedKVCache):
        return [*cache.keys, *cache.values]
    return [cache.keys, cache.values]
