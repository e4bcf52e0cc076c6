"""The training step of a drafter: its state rolled out along the text as at inference, a loss at every offset.

From position t the drafter is given the target's hidden state h_t and, one by one, the tokens t+1, t+2, ...; after each
it predicts the next. Offset i (from 0) has read i + 1 tokens and predicts token t + 2 + i:

    t      h_t     reads x_{t+1}    predicts x_{t+2}      offset 0
                   reads x_{t+2}    predicts x_{t+3}      offset 1   ...

The target's own distribution of token p, which serves all offsets, is its head's at position p - 1. Source: the
alignment is that of Apple's trainer; the text is teacher-forced, or in part the drafter's own (`own_tokens`).

A text is followed only as far as serving would: where the drafter gives its tokens so far less than `reach`, they
would stand in no tree, and what it would have said next is never asked. So the deeper offsets are learnt where they
count, and most of their products with the head are never computed.

Neither states nor logits are ever there for a whole batch: starting positions go in chunks, and each chunk's graph is
differentiated and dropped before the next is built.
"""

from __future__ import annotations

import math
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
from vllm_redrafter.training.memory import HiddenMemory
from vllm_redrafter.training.target import FrozenTarget, TargetView

TOP_K = 5
"""How many of the drafter's best tokens are looked at where accuracy is told."""

_ROWS_STEP = 128
"""Rows are followed in multiples of it: libraries keep what they prepared for every size of a product."""
_NUMBERS_PER_CHUNK = 1 << 21
"""Logits of one offset that are in memory at the same time, within the chunk sizes below."""
_CHUNK_SIZES = (256, 1024)


@dataclass(frozen=True)
class Objective:
    """What a drafter is trained for."""

    loss: str = "kl"
    """`ce`, `kl` or `lk` (`training.loss`)."""
    num_offsets: int = 6
    """Tokens predicted from every position, which is how deep the drafter learns to draft."""
    decay: float = 1.0
    """Weight of an offset relative to that of the one before."""
    own_tokens: float = 0.0
    """How often the state reads the drafter's own best token in the place of the text's."""
    reach: float = 0.05
    """Probability that the drafter must give the text so far for its next token to count; 0 follows every text."""
    chunk_size: int | None = None
    """Positions whose logits are in memory at the same time; None for as many as suit the size of the head."""

    def __post_init__(self) -> None:
        if self.loss not in TOKEN_LOSSES:
            raise ValueError(f"loss is {self.loss!r}, but it must be one of {', '.join(TOKEN_LOSSES)}")
        for name in ("num_offsets", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but it must be at least 1")
        if self.decay <= 0:
            raise ValueError(f"decay is {self.decay}, but it must be above 0")
        for name in ("own_tokens", "reach"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it is a probability: it must lie in 0..1")

    @property
    def weights(self) -> torch.Tensor:
        """Weight of every offset, [num_offsets]."""
        return self.decay ** torch.arange(self.num_offsets, dtype=torch.float32)

    def positions_per_chunk(self, head_size: int) -> int:
        """Return `chunk_size`, or what suits a head that scores so many tokens."""
        if self.chunk_size is not None:
            return self.chunk_size
        fewest, most = _CHUNK_SIZES
        return min(max(_NUMBERS_PER_CHUNK // head_size, fewest), most)


class StepReport(NamedTuple):
    """What a batch yields: one loss to follow downhill, and sums per offset to report."""

    loss: torch.Tensor  # []
    loss_sums: torch.Tensor  # [num_offsets]: unweighted
    num_correct: torch.Tensor  # [num_offsets, TOP_K]: column k counts the targets among the drafter's k + 1 best tokens
    num_reached: torch.Tensor  # [num_offsets]: the targets that both sums are over


class Rollout(nn.Module):
    """A drafter with its objective; the drafter's parameters are the only ones.

    The target is no submodule on purpose: whatever wraps, moves or saves this module leaves the target alone.
    """

    draft_ids: torch.Tensor  # [vocab_size], -1 for what cannot be drafted

    def __init__(
        self, drafter: ReDrafter, target: FrozenTarget, objective: Objective, memory: HiddenMemory | None = None
    ) -> None:
        super().__init__()
        self.drafter = drafter
        self.objective = objective
        self._target = (target,)
        self._memory = memory
        self._compare: Callable[..., _Comparison] = partial(_compare, TOKEN_LOSSES[objective.loss])
        self._teach: Callable[..., _Teacher] = _teach
        self._chunk_size = objective.positions_per_chunk(drafter.config.head_size)
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
        # the number of rows changes from offset to offset
        self._compare = torch.compile(self._compare, dynamic=True)
        self._teach = torch.compile(self._teach, dynamic=True)

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
        parts = [partial(part, start) for start in range(0, num_positions, self._chunk_size)]
        parameters = [parameter for parameter in self.drafter.parameters() if parameter.requires_grad]
        if not torch.is_grad_enabled():
            parameters = []
        return StepReport(*_SumOfParts.apply(parts, *parameters))  # type: ignore[no-untyped-call]

    def _part(self, text: _Text, start: int, weights: torch.Tensor, own_share: float) -> StepReport:
        """Return the share of the positions from `start` on in the sums."""
        objective = self.objective
        size = min(self._chunk_size, len(text.draft_ids) - objective.num_offsets - 1 - start)
        valid = text.valid_from(start, size)  # [num_offsets, size]
        compared: list[_Comparison] = []
        # waits for the device: prompts and padding fill whole chunks, which cost nothing this way
        if not bool(valid.any()):
            return _report(compared, weights)

        teacher = self._teacher(text, start, size)
        rows = torch.arange(size, device=valid.device)
        is_followed = valid.any(dim=0)
        log_prob = torch.zeros(size, device=valid.device)
        state = self.drafter.start(text.hidden[start : start + size])
        for offset in range(objective.num_offsets):
            kept = _rows_of_interest(is_followed)
            if kept is None:
                break
            rows, is_followed, log_prob = rows[kept], is_followed[kept], log_prob[kept]
            state = DraftState(state.context[kept], state.recurrent[kept])
            read = text.embeddings[start + 1 + offset + rows]
            if own_share > 0 and offset > 0:
                # the global generator: trainers save and restore it, so a resumed run draws the same
                own = torch.rand(len(rows), device=read.device) < own_share
                read = torch.where(own[:, None], self._own_embeddings(state), read)
            state = self.drafter.advance(state, read)
            labels = text.draft_ids[start + 2 + offset + rows]
            counts = valid[offset, rows] & is_followed
            compared.append(self._compare(self.drafter.logits(state), teacher, rows + offset, labels, counts))
            if objective.reach > 0:
                log_prob = log_prob + compared[-1].log_prob
                is_followed = is_followed & (log_prob > math.log(objective.reach))
        return _report(compared, weights)

    @torch.no_grad()
    def _own_embeddings(self, state: DraftState) -> torch.Tensor:
        best = self.drafter.logits(state).argmax(dim=-1)
        ids = self.drafter.target_ids()
        return self._target[0].embed(best if ids is None else ids[best]).to(state.recurrent.dtype)

    @torch.no_grad()
    def _teacher(self, text: _Text, start: int, size: int) -> _Teacher | None:
        """Return what the target says from the token after position `start` + 1 on, or None where it is not asked."""
        if self.objective.loss == "ce":
            return None
        last = start + self.objective.num_offsets + size
        # the last hidden state alone, not what left the fused layers
        hidden = text.hidden[start + 1 : last, : self.drafter.config.hidden_size]
        return self._teach(self._target[0].logits(hidden), self.drafter.target_ids())

    def _view(self, batch: Batch) -> TargetView:
        target, layers = self._target[0], self.drafter.config.fused_layers
        if self._memory is None:
            return target.read(batch, layers)
        hidden = self._memory.read(batch, lambda part: target.read(part, layers).hidden)
        return TargetView(hidden, target.embed(batch.token_ids))

    def _text(self, batch: Batch) -> _Text:
        view = self._view(batch)
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


class _Teacher(NamedTuple):
    """The target's distributions of successive tokens, in terms of the draft vocabulary."""

    probs: torch.Tensor  # [places, head_size]: normalised over the target's whole vocabulary
    entropy: torch.Tensor  # [places]


def _teach(
    logits: torch.Tensor,  # [places, vocab_size]
    ids: torch.Tensor | None,  # [head_size]
) -> _Teacher:
    """Return what the target's logits say of the tokens with these ids, None for all."""
    logits = logits.float()
    log_probs = (logits if ids is None else logits[:, ids]) - logits.logsumexp(dim=-1, keepdim=True)
    probs = log_probs.exp()
    return _Teacher(probs, -(probs * log_probs).sum(dim=-1))


class _Comparison(NamedTuple):
    """What one offset's logits say, held against what was expected."""

    loss: torch.Tensor  # []: the sum over the rows that count
    num_correct: torch.Tensor  # [TOP_K], of those
    num_reached: torch.Tensor  # []: their number
    log_prob: torch.Tensor  # [rows]: of the text's token, -inf where it cannot be drafted


def _compare(
    token_loss: TokenLoss,
    logits: torch.Tensor,  # [rows, head_size]
    teacher: _Teacher | None,
    places: torch.Tensor,  # [rows], of the teacher
    labels: torch.Tensor,  # [rows], -1 for what cannot be drafted
    counts: torch.Tensor,  # [rows] bool
) -> _Comparison:
    """Return loss, accuracy and the text's probability."""
    logits = logits.float()
    nothing = logits.new_empty(0)
    probs, entropy = (nothing, nothing) if teacher is None else (teacher.probs[places], teacher.entropy[places])
    losses = token_loss(logits, Expected(probs, entropy, labels))
    fixed = logits.detach()
    own = fixed.gather(-1, labels.clamp(min=0)[:, None])
    is_unknown = labels < 0
    rank = (fixed > own).sum(dim=-1).masked_fill(~counts | is_unknown, TOP_K)
    num_correct = (rank[:, None] < torch.arange(1, TOP_K + 1, device=rank.device)).sum(dim=0)
    log_prob = (own[:, 0] - fixed.logsumexp(dim=-1)).masked_fill(is_unknown, float("-inf"))
    return _Comparison(losses.masked_fill(~counts, 0).sum(), num_correct, counts.sum(), log_prob)


def _report(compared: list[_Comparison], weights: torch.Tensor) -> StepReport:
    """Return what the first offsets yielded; the others were not reached."""
    num_missing = len(weights) - len(compared)
    nothing = weights.new_zeros(())
    losses = torch.stack([each.loss for each in compared] + [nothing] * num_missing)
    none_correct = torch.zeros(TOP_K, dtype=torch.int64, device=weights.device)
    num_correct = torch.stack([each.num_correct for each in compared] + [none_correct] * num_missing)
    num_reached = torch.stack([each.num_reached for each in compared] + [none_correct[0]] * num_missing)
    return StepReport((losses * weights).sum(), losses.detach(), num_correct, num_reached)


def _rows_of_interest(wanted: torch.Tensor) -> torch.Tensor | None:  # [rows] bool -> [kept]
    """Return the indices of the wanted rows and of as many others as make a multiple, or None where none is wanted."""
    # waits for the device: what is left out costs nothing this way
    num_wanted = int(wanted.sum())
    if num_wanted == 0:
        return None
    num_kept = min(len(wanted), -(-num_wanted // _ROWS_STEP) * _ROWS_STEP)
    return wanted.int().argsort(descending=True, stable=True)[:num_kept]


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
