"""The recurrent drafter: an RNN over token embeddings, conditioned on hidden states of the target.

Equations: arXiv 2403.09919, section 3.1, as Apple's code has them. With h the target's last hidden state (after its
final norm) at the last token whose keys and values are cached, E the target's embedding table without any scaling,
s_0 = 0 and g_0 the token that the target has just chosen:

    s_t = SiLU(W_w E(g_{t-1}) + W_u s_{t-1} + b_u)          (rnn)
    s_t = s_{t-1} + E(g_{t-1})                              (no rnn)
    x   = [h; s_t], projected if exit_dim != 2 * hidden_size
    x   = x + SiLU(A_i x + a_i)                             for every residual block i
    logits of g_t = W_o x

With `fused_layers`, the outputs l_1, ..., l_k of those layers at the same token join h; n scales each to a root mean
square of 1, for they differ by orders of magnitude:

    h   = h + F [n(l_1); ...; n(l_k)]

That several layers tell more than the last one, and the name of F, `fc.weight`, come from EAGLE-3 (arXiv 2503.01840,
section 3.1), whose F makes all of the context; here it adds to Apple's, and from F = 0 training starts at their model.

The drafter owns neither E nor, when tied, W_o: both are lent by the target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from vllm_redrafter.core.config import ReDrafterConfig

Embed = Callable[[torch.Tensor], torch.Tensor]
"""Maps token ids [...] to the target's input embeddings [..., hidden_size]."""

_EPSILON = 1e-6
"""Added to the mean square of a layer's output, whatever the precision: what is served is what was trained."""


class DraftState(NamedTuple):
    """Where a draft stands: what the target handed over, and what the RNN has made of the drafted tokens."""

    context: torch.Tensor  # [..., exit_dim]: the part of x that comes from h; it never changes during a draft
    recurrent: torch.Tensor  # [..., hidden_size]: s_t


class Elementwise(NamedTuple):
    """What lies between a drafter's matrix products: one kernel each on a GPU that serves, where torch launches two."""

    silu_of_sum: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """`SiLU(a + b)`."""
    plus_silu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """`x + SiLU(y)`."""


def silu_of_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return `SiLU(a + b)`."""
    return functional.silu(a + b)


def plus_silu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return `x + SiLU(y)`."""
    return x + functional.silu(y)


_OF_TORCH = Elementwise(silu_of_sum, plus_silu)


class ResidualBlock(nn.Module):
    """`x + SiLU(linear(x))`; the module's name inside is Apple's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.elementwise = _OF_TORCH

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., dim] -> [..., dim]
        """Return the block's output, of the input's shape."""
        return self.elementwise.plus_silu(x, self.linear(x))


class ReDrafter(nn.Module):
    """A recurrent drafter; its tensors carry Apple's names, so that checkpoints load unchanged."""

    d2t: torch.Tensor | None
    t2d: torch.Tensor | None

    def __init__(self, config: ReDrafterConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        hidden, exit_dim = config.hidden_size, config.exit_dim
        if config.has_input_proj:
            self.input_proj = nn.Linear(2 * hidden, exit_dim)
        blocks: list[nn.Module] = [ResidualBlock(exit_dim) for _ in range(config.num_draft_layers)]
        if not config.tie_lm_head:
            blocks.append(nn.Linear(exit_dim, config.head_size, bias=False))
        self.lm_head = nn.ModuleList(blocks)
        if config.rnn:
            self.rnn_u = nn.Linear(hidden, hidden)
            self.rnn_w: nn.Module = nn.Linear(hidden, hidden, bias=False)
        if config.fused_layers:
            # last, so that a seed gives the other tensors the same numbers with and without it
            self.fc = nn.Linear(config.input_size - hidden, hidden, bias=False)
            nn.init.zeros_(self.fc.weight)
        reduced = config.draft_vocab_size is not None
        self.register_buffer("d2t", torch.zeros(config.head_size, dtype=torch.int64) if reduced else None)
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool) if reduced else None)
        self._tied_head: torch.Tensor | None = None
        self._elementwise = _OF_TORCH

    def set_draft_vocabulary(self, target_ids: torch.Tensor) -> None:
        """Let the head's row i stand for token `target_ids[i]` of the target.

        Stored as EAGLE-3 does in `speculators`: `d2t` holds the offset from draft id to target id, `t2d` marks the
        target's tokens that can be drafted.

        Args:
            target_ids: [draft_vocab_size], ascending and distinct.

        Raises:
            ValueError: the ids do not fit the configuration.
        """
        size = self.config.draft_vocab_size
        if size is None or target_ids.shape != (size,):
            raise ValueError(
                f"a draft vocabulary of shape {tuple(target_ids.shape)} was given, but {size} ids are needed"
            )
        first, last = int(target_ids[0]), int(target_ids[-1])
        if first < 0 or last >= self.config.vocab_size or bool((target_ids.diff() < 1).any()):
            raise ValueError(f"draft vocabulary ids must be ascending and below vocab_size ({self.config.vocab_size})")
        assert self.d2t is not None
        assert self.t2d is not None
        self.d2t.copy_(target_ids - torch.arange(size, device=target_ids.device))
        self.t2d.zero_()
        self.t2d[target_ids] = True

    def tie_head(self, target_head: torch.Tensor) -> None:  # [vocab_size, hidden_size]
        """Use the rows of the target's head that can be drafted; nothing is copied where all of them can."""
        if not self.config.tie_lm_head:
            raise ValueError("this drafter has its own head: only one with tie_lm_head=true takes the target's")
        rows = self.target_ids()
        # detached: a module takes an nn.Parameter for its own, and would train and save it
        self._tied_head = (target_head if rows is None else target_head[rows]).detach()

    def use(self, elementwise: Elementwise) -> None:
        """Compute what lies between matrix products with these functions, for serving: they need not have gradients."""
        self._elementwise = elementwise
        for block in self.residual_blocks():
            block.elementwise = elementwise

    def keep_head_rows(self, rows: range) -> None:
        """Drop all rows of the head but these: the logits of a draft id i are then at `i - rows.start`.

        For serving: the drafter can no longer be trained or saved. A tied head must have been lent.
        """
        part = slice(rows.start, rows.stop)
        # copies, or the whole head would stay in memory behind a part of it
        if self.config.tie_lm_head:
            assert self._tied_head is not None
            self._tied_head = self._tied_head[part].clone()
        else:
            head = self.lm_head[-1]
            assert isinstance(head, nn.Linear)
            head.weight = nn.Parameter(head.weight[part].detach().clone(), requires_grad=False)

    def fold_embeddings(self, table: torch.Tensor) -> torch.Tensor:  # [vocab_size, hidden_size]
        """Return the table of `W_w E(g)`, whose rows `advance` takes from now on in the place of embeddings.

        For serving: the drafter can no longer be trained or saved.

        Raises:
            ValueError: there is no W_w.
        """
        if not self.config.rnn:
            raise ValueError("this drafter adds embeddings up as they are (rnn=false): there is nothing to fold")
        folded: torch.Tensor = self.rnn_w(table)
        self.rnn_w = nn.Identity()
        return folded

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.parameters()).dtype

    def residual_blocks(self) -> list[ResidualBlock]:
        """Return the blocks before the head."""
        return [block for block in self.lm_head if isinstance(block, ResidualBlock)]

    def head_weight(self) -> torch.Tensor:
        """Return the head's matrix, [head_size, exit_dim], its own or the one that was lent.

        Raises:
            RuntimeError: the head is tied and `tie_head` has not been called.
        """
        if not self.config.tie_lm_head:
            head = self.lm_head[-1]
            assert isinstance(head, nn.Linear)
            return head.weight
        if self._tied_head is None:
            raise RuntimeError("the drafter's head is tied to the target's: call tie_head() first")
        return self._tied_head

    def target_ids(self) -> torch.Tensor | None:
        """Return the target's id for every row of the head, [draft_vocab_size], or None where they are the same."""
        if self.d2t is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def drafted_ids(self, device: torch.device) -> torch.Tensor:
        """Return the target's id for every row of the head, [head_size], also where they are the same."""
        ids = self.target_ids()
        return torch.arange(self.config.head_size, device=device) if ids is None else ids.to(device)

    def fuse(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., input_size] -> [..., hidden_size]
        """Return h: the target's last hidden state, and what the drafter makes of the outputs of `fused_layers`."""
        if not self.config.fused_layers:
            return hidden
        size = self.config.hidden_size
        outputs = hidden[..., size:].reshape(*hidden.shape[:-1], -1, size)
        added: torch.Tensor = self.fc(functional.rms_norm(outputs, [size], eps=_EPSILON).flatten(-2))
        return hidden[..., :size] + added

    def start(self, hidden: torch.Tensor) -> DraftState:  # [..., input_size]
        """Return the state from which the tokens after g_0 are drafted.

        Args:
            hidden: the target's last hidden state, and behind it what left the `fused_layers`.
        """
        hidden = self.fuse(hidden)
        if self.config.has_input_proj:
            # [h; s] W = h W_h + s W_s, and h is the same for all beams and depths
            context = functional.linear(hidden, self.input_proj.weight[:, : hidden.shape[-1]], self.input_proj.bias)
        else:
            context = hidden
        return DraftState(context, torch.zeros_like(hidden))

    def advance(self, state: DraftState, embedding: torch.Tensor) -> DraftState:  # embedding: [..., hidden_size]
        """Return the state after one more token, given that token's embedding."""
        if self.config.rnn:
            recurrent = self._elementwise.silu_of_sum(self.rnn_w(embedding), self.rnn_u(state.recurrent))
        else:
            recurrent = state.recurrent + embedding
        return DraftState(state.context, recurrent)

    def logits(self, state: DraftState) -> torch.Tensor:
        """Return the scores of the next token, [..., head_size], by draft id.

        Raises:
            RuntimeError: the head is tied and `tie_head` has not been called.
        """
        context, recurrent = state
        if self.config.has_input_proj:
            x = context + functional.linear(recurrent, self.input_proj.weight[:, recurrent.shape[-1] :])
        else:
            x = torch.cat((context.expand_as(recurrent), recurrent), dim=-1)
        for block in self.lm_head[: self.config.num_draft_layers]:
            x = block(x)
        if not self.config.tie_lm_head:
            logits: torch.Tensor = self.lm_head[-1](x)
            return logits
        return functional.linear(x, self.head_weight().to(x.dtype))

    def processed_logits(
        self, state: DraftState, change: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return logits whose softmax is Q of the next token, [..., head_size]; -inf outside the `top_k` best.

        What is as good as the last of those is kept too.

        Args:
            change: what is made of them, in fp32; without it they come in the drafter's own type.
        """
        logits = self.logits(state)
        top_k = self.config.top_k
        if top_k is not None and top_k < logits.shape[-1]:
            threshold = logits.topk(top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < threshold, float("-inf"))
        return logits if change is None else change(logits.float())
