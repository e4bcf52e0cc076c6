"""Naive twins of the core, in loops, dicts and float64: what the tests hold the fast code against.

A prefix is the tuple of drafted tokens after the root; the root itself is the empty one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.core.token_tree import TokenTree

Prefix = tuple[int, ...]
LogProbs = Callable[[Prefix], np.ndarray]
"""log Q of the token after a prefix, by the target's token id, [vocab]; -inf where the drafter does not look."""


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def drafter_log_probs(
    drafter: ReDrafter,
    embeddings: torch.Tensor,
    hidden: torch.Tensor,
    init_id: int,
    sharpness: float = 1.0,
    noise: torch.Tensor | None = None,  # [depths, head_size]
) -> LogProbs:
    """Return Apple's equations (REDRAFTER 1.4), read off the checkpoint's tensors and nothing else."""
    config = drafter.config
    weights = {name: tensor.double().numpy() for name, tensor in drafter.state_dict().items()}
    table = embeddings.detach().double().numpy()
    context, *outputs = hidden.detach().double().numpy().reshape(-1, config.hidden_size)
    if outputs:
        normalised = [output / np.sqrt(np.mean(output**2) + 1e-6) for output in outputs]
        context = context + weights["fc.weight"] @ np.concatenate(normalised)
    if config.tie_lm_head:
        assert drafter._tied_head is not None
        head = drafter._tied_head.detach().double().numpy()
    else:
        head = weights[f"lm_head.{config.num_draft_layers}.weight"]
    target_ids = np.arange(config.vocab_size)
    if config.draft_vocab_size is not None:
        target_ids = np.arange(config.draft_vocab_size) + weights["d2t"].astype(int)

    def log_probs(prefix: Prefix) -> np.ndarray:
        state = np.zeros(config.hidden_size)
        for token_id in (init_id, *prefix):
            if config.rnn:
                state = silu(
                    weights["rnn_w.weight"] @ table[token_id] + weights["rnn_u.weight"] @ state + weights["rnn_u.bias"]
                )
            else:
                state = state + table[token_id]
        x = np.concatenate([context, state])
        if config.exit_dim != 2 * config.hidden_size:
            x = weights["input_proj.weight"] @ x + weights["input_proj.bias"]
        for i in range(config.num_draft_layers):
            x = x + silu(weights[f"lm_head.{i}.linear.weight"] @ x + weights[f"lm_head.{i}.linear.bias"])
        logits = head @ x
        if config.top_k is not None:
            threshold = np.sort(logits)[::-1][min(config.top_k, len(logits)) - 1]
            logits = np.where(logits >= threshold, logits, -np.inf)
        if noise is not None:
            logits = logits + noise[len(prefix)].double().numpy()
        logits = sharpness * logits
        logits = logits - logits.max()
        out = np.full(config.vocab_size, -np.inf)
        out[target_ids] = logits - np.log(np.exp(logits).sum())
        return out

    return log_probs


class Search(NamedTuple):
    candidates: list[dict[Prefix, float]]
    """The candidates kept at every depth with their cumulative log-probability, best first."""
    smallest_gap: float
    """How far the closest choice was from going the other way: a float32 search may differ below its rounding."""


def beam_search(log_probs: LogProbs, width: int, length: int, num_candidates: int | None = None) -> Search:
    """Return every candidate of a beam search that keeps the best `num_candidates` per depth and expands `width`."""
    kept = max(width, num_candidates or 0)
    beams: dict[Prefix, float] = {(): 0.0}
    depths: list[dict[Prefix, float]] = []
    smallest_gap = float("inf")
    for _ in range(length):
        scored = [
            (score + step, (*prefix, token_id))
            for prefix, score in beams.items()
            for token_id, step in enumerate(log_probs(prefix))
            if step > -np.inf
        ]
        scored.sort(reverse=True)
        for cut in (kept, width):
            if cut < len(scored):
                smallest_gap = min(smallest_gap, scored[cut - 1][0] - scored[cut][0])
        depths.append({prefix: score for score, prefix in scored[:kept]})
        beams = dict(list(depths[-1].items())[:width])
    return Search(depths, smallest_gap)


def apple_beam_search(log_probs: LogProbs, width: int, length: int) -> list[tuple[float, Prefix]]:
    """Return Apple's beams (REDRAFTER 2.2, 2.3): always `width` of them, dead ones at -50000 among them."""
    log_zero = -50000.0
    beams: list[tuple[float, Prefix]] = [(0.0, ())] + [(log_zero, ())] * (width - 1)
    for _ in range(length):
        scored = [
            (score + max(step, log_zero), (*prefix, token_id))
            for score, prefix in beams
            for token_id, step in enumerate(log_probs(prefix))
        ]
        scored.sort(key=lambda beam: beam[0], reverse=True)
        beams = scored[:width]
    return beams


def layout(candidates: dict[Prefix, float], num_nodes: int) -> list[Prefix]:
    """Return the tree's nodes without the root: the most probable prefixes, depth first, best child first."""
    best = dict(sorted(candidates.items(), key=lambda item: (-item[1], len(item[0])))[:num_nodes])
    children: dict[Prefix, list[Prefix]] = {}
    for prefix in best:  # best first
        children.setdefault(prefix[:-1], []).append(prefix)

    def below(prefix: Prefix) -> list[Prefix]:
        return [node for child in children.get(prefix, []) for node in (child, *below(child))]

    return below(())


def prefixes(tree: TokenTree, row: int = 0) -> list[Prefix]:
    """Return the prefix of every node of a row, the root's first, read off the parents."""
    found: list[Prefix] = [()]
    for node in range(1, 1 + int(tree.num_nodes[row])):
        parent = int(tree.parents[row, node])
        assert 0 <= parent < node, "a parent stands before its child"
        found.append((*found[parent], int(tree.token_ids[row, node])))
    return found


def trie(beams: Sequence[Prefix]) -> set[Prefix]:
    """Return the distinct prefixes of some beams, by a dict of dicts."""
    root: dict[int, dict] = {}
    for beam in beams:
        node = root
        for token_id in beam:
            node = node.setdefault(token_id, {})

    def walk(node: dict[int, dict], prefix: Prefix) -> set[Prefix]:
        return set().union(*({(*prefix, t)} | walk(child, (*prefix, t)) for t, child in node.items()))

    return walk(root, ())


def accept(nodes: Sequence[Prefix], choose: Callable[[Prefix], int]) -> Prefix:
    """Return the tokens emitted: the longest path of nodes that the choices follow, and the choice at its end."""
    emitted: Prefix = (choose(()),)
    while emitted in nodes:
        emitted = (*emitted, choose(emitted))
    return emitted


def apple_accept(
    beams: np.ndarray,  # [width, length]
    target: Callable[[Prefix], np.ndarray],  # P after a prefix, [vocab]
    draft: Callable[[Prefix], np.ndarray],  # Q after a prefix, [vocab]
    num_rows: int,
    rng: np.random.Generator,
) -> list[Prefix]:
    """Return what Apple's rule emits (REDRAFTER 4.3): a coin per beam and token, the longest run, its residual."""
    width, length = beams.shape
    paths = [tuple(int(token_id) for token_id in beam) for beam in beams]
    ratios = np.array(
        [[target(path[:i])[path[i]] / draft(path[:i])[path[i]] for i in range(length)] for path in paths]
    )  # [width, length]
    runs = (rng.random((num_rows, width, length)) < ratios).cumprod(axis=-1).sum(axis=-1)  # [rows, width]
    emitted: list[Prefix] = [()] * num_rows
    best = runs.argmax(axis=1)
    for beam in range(width):
        for run in range(length + 1):
            rows = np.flatnonzero((best == beam) & (runs[:, beam] == run))
            prefix = paths[beam][:run]
            last = target(prefix)
            if run < length:
                last = np.maximum(last - draft(prefix), 0)
            if len(rows) == 0:
                continue
            for row, token_id in zip(rows, rng.choice(len(last), len(rows), p=last / last.sum()), strict=True):
                emitted[row] = (*prefix, int(token_id))
    return emitted
