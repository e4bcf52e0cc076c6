"""The recurrent drafter: an RNN over token embeddings, conditioned on one hidden state of the target.

Equations: arXiv 2403.09919, section 3.1, as Apple's code has them. With h the target's last hidden state (after its
final norm) at the last token whose keys and values are cached, E the target's embedding table without any scaling,
s_0 = 0 and g_0 the token that the target has just chosen:

    s_t = SiLU(W_w E(g_{t-1}) + W_u s_{t-1} + b_u)          (rnn)
    s_t = s_{t-1} + E(g_{t-1})                              (no rnn)
    x   = [h; s_t], projected if exit_dim != 2 * hidden_size
    x   = x + SiLU(A_i x + a_i)                             for every residual block i
    logits of g_t = W_o x

The drafter owns neither E nor, when tied, W_o: both are lent by the target.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from mlx_port.config import ReDrafterConfig

Embed = Callable[[mx.array], mx.array]
"""Maps token ids [...] to the target's input embeddings [..., hidden_size]."""


class DraftState(NamedTuple):
    """Where a draft stands: what the target handed over, and what the RNN has made of the drafted tokens."""

    context: mx.array  # [..., exit_dim]: the part of x that comes from h; it never changes during a draft
    recurrent: mx.array  # [..., hidden_size]: s_t


class ResidualBlock(nn.Module):
    """`x + SiLU(linear(x))`; the module's name inside is Apple's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:  # [..., dim] -> [..., dim]
        """Return the block's output, of the input's shape."""
        return x + nn.silu(self.linear(x))


class ReDrafter(nn.Module):
    """A recurrent drafter; `checkpoint.load_drafter` makes one that has weights."""

    def __init__(self, config: ReDrafterConfig) -> None:
        super().__init__()
        self.config = config
        hidden, exit_dim = config.hidden_size, config.exit_dim
        if config.has_input_proj:
            # [h; s] W = h W_h + s W_s: kept apart, as h is the same for all beams and depths
            self.context_proj = nn.Linear(hidden, exit_dim)
            self.recurrent_proj = nn.Linear(hidden, exit_dim, bias=False)
        self.lm_head: list[Any] = [ResidualBlock(exit_dim) for _ in range(config.num_draft_layers)]
        if not config.tie_lm_head:
            self.lm_head.append(nn.Linear(exit_dim, config.head_size, bias=False))
        if config.rnn:
            self.rnn_u = nn.Linear(hidden, hidden)
            self.rnn_w = nn.Linear(hidden, hidden, bias=False)
        # what begins with an underscore is no parameter to MLX
        self._target_ids: mx.array | None = None
        self._tied_head: Callable[[mx.array], mx.array] | None = None

    def set_draft_vocabulary(self, target_ids: mx.array) -> None:  # [draft_vocab_size]
        """Let the head's row i stand for token `target_ids[i]` of the target."""
        self._target_ids = target_ids

    def tie_head(self, head: nn.Module) -> None:
        """Use the target's head (a linear layer, or its embedding), or the rows of it that can be drafted."""
        if not self.config.tie_lm_head:
            raise ValueError("this drafter has its own head: only one with tie_lm_head=true takes the target's")
        if self._target_ids is not None:
            head = _rows(head, self._target_ids)
        self._tied_head = getattr(head, "as_linear", head)

    def target_ids(self) -> mx.array | None:
        """Return the target's id for every row of the head, [draft_vocab_size], or None where they are the same."""
        return self._target_ids

    def start(self, hidden: mx.array) -> DraftState:  # [..., hidden_size]
        """Return the state from which the tokens after g_0 are drafted."""
        context = self.context_proj(hidden) if self.config.has_input_proj else hidden
        return DraftState(context, mx.zeros_like(hidden))

    def advance(self, state: DraftState, embedding: mx.array) -> DraftState:  # embedding: [..., hidden_size]
        """Return the state after one more token, given that token's embedding."""
        if self.config.rnn:
            recurrent = nn.silu(self.rnn_w(embedding) + self.rnn_u(state.recurrent))
        else:
            recurrent = state.recurrent + embedding
        return DraftState(state.context, recurrent)

    def logits(self, state: DraftState) -> mx.array:
        """Return the scores of the next token, [..., head_size], by draft id.

        Raises:
            RuntimeError: the head is tied and `tie_head` has not been called.
        """
        context, recurrent = state
        if self.config.has_input_proj:
            x = context + self.recurrent_proj(recurrent)
        else:
            x = mx.concatenate((mx.broadcast_to(context, recurrent.shape), recurrent), axis=-1)
        for block in self.lm_head[: self.config.num_draft_layers]:
            x = block(x)
        if not self.config.tie_lm_head:
            return self.lm_head[-1](x)
        if self._tied_head is None:
            raise RuntimeError("the drafter's head is tied to the target's: call tie_head() first")
        return self._tied_head(x)

    def log_probs(self, state: DraftState) -> mx.array:
        """Return log Q of the next token in fp32, [..., head_size]; -inf outside the `top_k` best, ties kept."""
        logits = self.logits(state).astype(mx.float32)
        top_k = self.config.top_k
        if top_k is not None and top_k < logits.shape[-1]:
            threshold = mx.topk(logits, top_k, axis=-1).min(axis=-1, keepdims=True)
            logits = mx.where(logits < threshold, -mx.inf, logits)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _rows(layer: nn.Module, rows: mx.array) -> nn.Module:
    """Return a layer, quantised or not, with these of its output rows only."""
    part = copy.copy(layer)
    for name in ("weight", "scales", "biases"):
        if part.get(name) is not None:
            part[name] = layer[name][rows]
    return part
