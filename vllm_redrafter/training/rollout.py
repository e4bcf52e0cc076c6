"""The training step of a drafter: its state rolled out along the text as at inference, a loss at every offset.

From position t the drafter is given the target's hidden state h_t and, one by one, the tokens t+1, t+2, ...; after each
it predicts the next. Offset i (from 0) has read i + 1 tokens and predicts token t + 2 + i:

    t      h_t     reads x_{t+1}    predicts x_{t+2}      offset 0
                   reads x_{t+2}    predicts x_{t+3}      offset 1   ...

The target's own distribution of token p, which serves all offsets, is its head's at position p - 1. Source: the
alignment is that of Apple's trainer; the text is teacher-forced, or in part the drafter's own (`own_tokens`).

Neither states nor logits are ever there for a whole batch: starting positions go in chunks, and each chunk's graph is
differentiated and dropped before the next is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from vllm_redrafter.core.drafter import DraftState, ReDrafter
from vllm_redrafter.training.batch import Batch, predictable
from vllm_redrafter.training.loss import TOKEN_LOSSES, Expected, TokenLoss
from vllm_redrafter.training.target import FrozenTarget

TOP_K = 5
"""How many of the drafter's best tokens are looked at where accuracy is told."""


@dataclass(frozen=True)
class Objective:
    """What a drafter is trained for."""

    loss: str = "kl"
    """`ce`, `kl` or `lk` (`training.loss`)."""
    num_offsets: int = 5
    """Tokens predicted from every position, which is how deep the drafter learns to draft."""
    decay: float = 1.0
    """Weight of an offset relative to that of the one before."""
    own_tokens: float = 0.0
    """How often the state reads the drafter's own best token in the place of the text's."""
    chunk_size: int = 256
    """Positions whose logits are in memory at the same time."""

    def __post_init__(self) -> None:
        if self.loss not in TOKEN_LOSSES:
            raise ValueError(f"loss is {self.loss!r}, but it must be one of {', '.join(TOKEN_LOSSES)}")
        for name in ("num_offsets", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        if self.decay <= 0:
            raise ValueError(f"decay is {self.decay}, but it must be above 0")
        if not 0 <= self.own_tokens <= 1:
            raise ValueError(f"own_tokens is {self.own_tokens}, but it is a probability: it must lie in 0..1")

    @property
    def weights(self) -> torch.Tensor:
        """Weight of every offset, [num_offsets]."""
        return self.decay ** torch.arange(self.num_offsets, dtype=torch.float32)


class StepReport(NamedTuple):
    """What a batch yields: one loss to follow downhill, and sums per offset to report."""

    loss: torch.Tensor  # []
    loss_sums: torch.Tensor  # [num_offsets]: unweighted
    num_correct: torch.Tensor  # [num_offsets, TOP_K]: column k counts the targets among the drafter's k + 1 best tokens


class Rollout(nn.Module):
    """A drafter with its objective; the drafter's parameters are the only ones.

    The target is no submodule on purpose: whatever wraps, moves or saves this module leaves the target alone.
    """

    draft_ids: torch.Tensor  # [vocab_size], -1 for what cannot be drafted

    def __init__(self, drafter: ReDrafter, target: FrozenTarget, objective: Objective) -> None:
        super().__init__()
        self.drafter = drafter
        self.objective = objective
        self._target = (target,)
        self._compare: Callable[..., tuple[torch.Tensor, torch.Tensor]] = partial(
            _compare, TOKEN_LOSSES[objective.loss]
        )
        if objective.loss != "ce":
            target.check_head()
        ids = drafter.target_ids()
        draft_ids = torch.full((drafter.config.vocab_size,), -1)
        draft_ids[torch.arange(drafter.config.vocab_size) if ids is None else ids.cpu()] = torch.arange(
            drafter.config.head_size
        )
        self.register_buffer("draft_ids", draft_ids, persistent=False)

    def compile_losses(self) -> None:
        """Let torch.compile make one loop of what is done to logits: eager, that is a fifth of a step more on a CPU."""
        self._compare = torch.compile(self._compare)

    def num_targets(self, batch: Batch) -> torch.Tensor:
        """Return how many tokens each offset is trained on, [num_offsets]."""
        return self._valid(batch).sum(dim=(1, 2))

    def forward(self, batch: Batch, num_targets: torch.Tensor, progress: float = 1.0) -> StepReport:
        """Return the loss: per offset its sum over `num_targets`, [num_offsets], then the weighted sum of those.

        Args:
            num_targets: what `self.num_targets` says of this batch, or of all batches of an optimiser's step together.
            progress: share of the training that is done; `own_tokens` grows with it from 0.
        """
        text = self._text(batch)
        weights = self.objective.weights.to(num_targets.device) / num_targets.clamp(min=1)
        own_share = self.objective.own_tokens * progress

        def part(start: int) -> StepReport:
            return self._part(text, start, weights, own_share)

        num_positions = batch.token_ids.numel()
        parts = [partial(part, start) for start in range(0, num_positions, self.objective.chunk_size)]
        parameters = [parameter for parameter in self.drafter.parameters() if parameter.requires_grad]
        if not torch.is_grad_enabled():
            parameters = []
        return StepReport(*_SumOfParts.apply(parts, *parameters))  # type: ignore[no-untyped-call]

    def _part(self, text: _Text, start: int, weights: torch.Tensor, own_share: float) -> StepReport:
        """Return the share of the positions from `start` on in the sums."""
        num_offsets = self.objective.num_offsets
        size = min(self.objective.chunk_size, len(text.draft_ids) - num_offsets - 1 - start)
        valid = text.valid_from(start, size)  # [num_offsets, size]
        # waits for the device: prompts and padding fill whole chunks, which cost nothing this way
        if not bool(valid.any()):
            none_correct = torch.zeros(num_offsets, TOP_K, dtype=torch.int64, device=valid.device)
            return StepReport(weights.new_zeros(()), torch.zeros_like(weights), none_correct)
        logits = self._draft(text, start, size, own_share)
        expected = self._expected(text, start, size)
        losses, num_correct = self._compare(logits, expected, valid)
        return StepReport((losses * weights).sum(), losses.detach(), num_correct)

    def _draft(self, text: _Text, start: int, size: int, own_share: float) -> torch.Tensor:
        """Return the drafter's logits from `size` positions on, [num_offsets, size, head_size]."""
        state = self.drafter.start(text.hidden[start : start + size])
        recurrent: list[torch.Tensor] = []
        for offset in range(self.objective.num_offsets):
            read = text.embeddings[start + 1 + offset : start + 1 + offset + size]
            if own_share > 0 and recurrent:
                # the global generator: trainers save and restore it, so a resumed run draws the same
                own = torch.rand(size, device=read.device) < own_share
                read = torch.where(own[:, None], self._own_embeddings(state), read)
            state = self.drafter.advance(state, read)
            recurrent.append(state.recurrent)
        # one product with the head for all offsets: their states need nothing of each other's logits
        return self.drafter.logits(DraftState(state.context, torch.stack(recurrent)))

    @torch.no_grad()
    def _own_embeddings(self, state: DraftState) -> torch.Tensor:
        best = self.drafter.logits(state).argmax(dim=-1)
        ids = self.drafter.target_ids()
        return self._target[0].embed(best if ids is None else ids[best]).to(state.recurrent.dtype)

    def _expected(self, text: _Text, start: int, size: int) -> Expected:
        """Return what is expected where `_draft` drafts, [num_offsets, size, ...]: views that overlap."""
        num_offsets = self.objective.num_offsets
        last = start + num_offsets + size - 1
        labels = _windows(text.draft_ids[start + 2 : last + 2], num_offsets, size)
        if self.objective.loss == "ce":
            nothing = text.hidden.new_empty(0)
            return Expected(nothing, nothing, labels)
        # the last hidden state alone, not what left the fused layers
        last_hidden = text.hidden[start + 1 : last + 1, : self.drafter.config.hidden_size]
        log_probs = self._target[0].log_probs(last_hidden)  # [places, vocab_size]
        ids = self.drafter.target_ids()
        if ids is not None:
            log_probs = log_probs[:, ids]
        probs = log_probs.exp()
        entropy = -(probs * log_probs).sum(dim=-1)
        return Expected(_windows(probs, num_offsets, size), _windows(entropy, num_offsets, size), labels)

    def _text(self, batch: Batch) -> _Text:
        view = self._target[0].read(batch, self.drafter.config.fused_layers)
        beyond = self.objective.num_offsets + 1
        # a target in half precision, a drafter that is trained in full
        dtype = next(self.drafter.parameters()).dtype
        return _Text(
            functional.pad(view.hidden.flatten(0, 1).to(dtype), (0, 0, 0, beyond)),
            functional.pad(view.embeddings.flatten(0, 1).to(dtype), (0, 0, 0, beyond)),
            functional.pad(self.draft_ids[batch.token_ids.flatten()], (0, beyond), value=-1),
            functional.pad(self._valid(batch).flatten(1), (0, beyond)),
        )

    def _valid(self, batch: Batch) -> torch.Tensor:  # [num_offsets, sequences, length]
        valid = predictable(batch, self.objective.num_offsets)
        if self.objective.loss == "ce":
            valid = valid & (self.draft_ids[batch.token_ids] >= 0)
        return valid


def _windows(rows: torch.Tensor, num_windows: int, size: int) -> torch.Tensor:
    """Return rows [i, i + size) for every i below `num_windows`, [num_windows, size, ...], without copying them."""
    stride = rows.stride()
    return rows.as_strided((num_windows, size, *rows.shape[1:]), (stride[0], *stride))


def _compare(
    token_loss: TokenLoss,
    logits: torch.Tensor,  # [num_offsets, size, head_size]
    expected: Expected,
    valid: torch.Tensor,  # [num_offsets, size] bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of each offset's losses, [num_offsets], and its `_num_in_top`."""
    losses = token_loss(logits.float(), expected).masked_fill(~valid, 0).sum(dim=1)
    return losses, _num_in_top(logits.detach(), expected.labels, valid)


def _num_in_top(
    logits: torch.Tensor,  # [num_offsets, size, head_size]
    labels: torch.Tensor,  # [num_offsets, size], -1 for what cannot be drafted
    valid: torch.Tensor,  # [num_offsets, size] bool
) -> torch.Tensor:
    """Return how many labels are among the k best tokens, for k = 1..TOP_K, [num_offsets, TOP_K]."""
    own = logits.gather(-1, labels.clamp(min=0)[..., None])
    rank = (logits > own).sum(dim=-1).masked_fill(~valid | (labels < 0), TOP_K)
    return (rank[..., None] < torch.arange(1, TOP_K + 1, device=rank.device)).sum(dim=1)


class _Text(NamedTuple):
    """A batch as one row of tokens, with as much nothing behind it as the last position's offsets reach."""

    hidden: torch.Tensor  # [tokens + num_offsets + 1, input_size]
    embeddings: torch.Tensor  # [tokens + num_offsets + 1, hidden_size]
    draft_ids: torch.Tensor  # [tokens + num_offsets + 1]: -1 for what cannot be drafted
    valid: torch.Tensor  # [num_offsets, tokens + num_offsets + 1]: by the token that is predicted

    def valid_from(self, start: int, size: int) -> torch.Tensor:
        """Return `valid` by the position that the prediction starts from, [num_offsets, size]."""
        return torch.stack([row[start + 2 + i : start + 2 + i + size] for i, row in enumerate(self.valid)])


class _SumOfParts(torch.autograd.Function):
    """The sum of functions of the same parameters, each differentiated before the next one is computed.

    What autograd would keep of all of them until the backward pass is never there: one graph at a time, and one
    gradient per parameter.
    """

    @staticmethod
    def forward(ctx: Any, parts: list[Callable[[], StepReport]], *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        reports = []
        for part in parts:
            with torch.set_grad_enabled(bool(parameters)):
                report = part()
            if report.loss.requires_grad:
                found = torch.autograd.grad(report.loss, parameters, allow_unused=True)
                for gradient, share in zip(gradients, found, strict=True):
                    if share is not None:
                        gradient += share
            reports.append(StepReport(*(tensor.detach() for tensor in report)))
        ctx.save_for_backward(*gradients)
        sums = tuple(torch.stack(column).sum(dim=0) for column in zip(*reports, strict=True))
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *(gradient * upstream[0] for gradient in ctx.saved_tensors)
