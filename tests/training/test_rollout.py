"""The training step is the definition: at every position, drafted as at inference, a loss at every offset."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from tests.training.small import HIDDEN, VOCAB, make_documents, make_drafter, make_target
from vllm_redrafter.core.drafter import DraftState, ReDrafter
from vllm_redrafter.training.batch import Batch, collate
from vllm_redrafter.training.documents import Document
from vllm_redrafter.training.loss import TOKEN_LOSSES, Expected
from vllm_redrafter.training.packing import pack
from vllm_redrafter.training.recipe import Recipe, build_drafter
from vllm_redrafter.training.rollout import TOP_K, Objective, Rollout, StepReport
from vllm_redrafter.training.target import FrozenTarget, TargetView

DRAFTERS = {
    "plain": {"exit_dim": 2 * HIDDEN},
    "projected": {"exit_dim": 24},
    "sum of embeddings": {"rnn": False},
    "draft vocabulary": {"draft_vocab_size": VOCAB // 2},
    "fused layers": {"fused_layers": [0, 1], "exit_dim": 24},
    "tied head and draft vocabulary": {"draft_vocab_size": VOCAB // 2, "tie_lm_head": True, "exit_dim": HIDDEN},
}


def batch_of(documents: list[Document], max_length: int = 32) -> Batch:
    return Batch(**collate(pack(documents, max_length)))


def step(rollout: Rollout, batch: Batch) -> StepReport:
    return rollout(batch, rollout.num_targets(batch))


def by_definition(
    drafter: ReDrafter, target: FrozenTarget, documents: list[Document], objective: Objective
) -> torch.Tensor:
    """Return the loss with loops over documents, positions and offsets, and autograd over all of it."""
    ids = drafter.target_ids()
    sums = [torch.zeros(())] * objective.num_offsets
    num_targets = [0] * objective.num_offsets
    for document in documents:
        output = target.model(document.token_ids[None])
        hidden = target.hidden(document.token_ids, drafter.config.fused_layers)
        probs = output.logits[0].softmax(dim=-1)
        for start in range(len(document.token_ids) - 2):
            state, reached = drafter.start(hidden[start]), 1.0
            for offset in range(objective.num_offsets):
                place = start + 2 + offset
                if place >= len(document.token_ids):
                    break
                state = drafter.advance(state, target.embed(document.token_ids[place - 1]))
                token = int(document.token_ids[place])
                label = token if ids is None else next((i for i, known in enumerate(ids) if known == token), -1)
                before = reached
                reached *= float(drafter.logits(state).detach().softmax(dim=-1)[label]) if label >= 0 else 0.0
                if not document.is_target[place] or (objective.loss == "ce" and label < 0):
                    continue
                num_targets[offset] += 1
                if objective.reach > 0 and before <= objective.reach:
                    continue
                wanted = probs[place - 1 : place] if ids is None else probs[place - 1 : place, ids]
                expected = Expected(wanted, torch.special.entr(wanted).sum(dim=-1), torch.tensor([label]))
                sums[offset] = sums[offset] + TOKEN_LOSSES[objective.loss](drafter.logits(state)[None], expected)[0]
    means = [total / number for total, number in zip(sums, num_targets, strict=True)]
    return sum((weight * mean for weight, mean in zip(objective.weights, means, strict=True)), torch.zeros(()))


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize(("loss", "reach"), [("ce", 0), ("kl", 0), ("lk", 0), ("kl", 1e-8), ("ce", 1e-8)])
def test_loss_and_gradients_of_packed_documents_are_those_of_the_definition(name: str, loss: str, reach: float) -> None:
    documents, target, drafter = make_documents(9, 14, 4, 20, 3), make_target(), make_drafter(**DRAFTERS[name])
    if drafter.config.tie_lm_head:
        drafter.tie_head(target.head_weight)
    objective = Objective(loss=loss, num_offsets=3, decay=0.7, reach=reach, chunk_size=8)

    rollout, batch = Rollout(drafter, target, objective), batch_of(documents)

    report = step(rollout, batch)
    report.loss.backward()
    gradients = {name: parameter.grad for name, parameter in drafter.named_parameters()}
    drafter.zero_grad(set_to_none=True)
    reference = by_definition(drafter, target, documents, objective)
    reference.backward()

    first, second, _ = (report.num_reached / rollout.num_targets(batch)).tolist()
    assert first == 1
    assert 0 < second < 1 if reach > 0 else second == 1
    # float32 sums in two orders
    torch.testing.assert_close(report.loss, reference, rtol=1e-4, atol=1e-5)
    for parameter_name, parameter in drafter.named_parameters():
        torch.testing.assert_close(gradients[parameter_name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_compiled_it_is_the_same(loss: str) -> None:
    batch, target, drafter = batch_of(make_documents(9, 14, 4, 20)), make_target(), make_drafter()
    objective = Objective(loss=loss, num_offsets=3, chunk_size=16)
    eager, compiled = (Rollout(drafter, target, objective) for _ in range(2))
    compiled.compile_losses()

    expected, found = step(eager, batch), step(compiled, batch)
    gradients = [torch.autograd.grad(report.loss, list(drafter.parameters())) for report in (found, expected)]

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64, 1000])
def test_the_size_of_a_chunk_changes_nothing(chunk_size: int) -> None:
    batch, target = batch_of(make_documents(9, 14, 4, 20)), make_target()
    drafter = make_drafter()

    whole = step(Rollout(drafter, target, Objective(num_offsets=4, chunk_size=10_000)), batch)
    chunked = step(Rollout(drafter, target, Objective(num_offsets=4, chunk_size=chunk_size)), batch)

    for found, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("head_size", "expected"), [(50, 1024), (2048, 1024), (4096, 512), (8192, 256), (256_000, 256)]
)
def test_a_chunk_has_fewer_positions_the_larger_the_head(head_size: int, expected: int) -> None:
    assert Objective().positions_per_chunk(head_size) == expected
    assert Objective(chunk_size=3).positions_per_chunk(head_size) == 3


def test_every_tensor_of_the_drafter_learns_and_none_of_the_target() -> None:
    target, drafter = make_target(), make_drafter(exit_dim=24)
    rollout = Rollout(drafter, target, Objective())

    step(rollout, batch_of(make_documents(20))).loss.backward()

    assert {id(parameter) for parameter in rollout.parameters()} == {
        id(parameter) for parameter in drafter.parameters()
    }
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in target.model.parameters())


def test_fusion_learns_from_its_first_step_on_which_starts_at_a_drafter_without_it() -> None:
    target, batch = make_target(), batch_of(make_documents(20))
    plain = Rollout(build_drafter(target, Recipe(), None, "test"), target, Objective())
    fused = Rollout(build_drafter(target, Recipe(fused_layers=(1, 0)), None, "test"), target, Objective())

    report = step(fused, batch)
    report.loss.backward()

    assert fused.drafter.config.fused_layers == [0, 1]
    torch.testing.assert_close(report.loss, step(plain, batch).loss, rtol=1e-6, atol=0)
    gradient = fused.drafter.fc.weight.grad
    assert gradient is not None
    assert (gradient.reshape(HIDDEN, 2, HIDDEN).abs().sum(dim=(0, 2)) > 0).all()


def test_batches_of_one_step_add_up_to_the_batch_of_all() -> None:
    first, second, target = make_documents(9, 14), make_documents(5, 20, seed=1), make_target()
    drafter = make_drafter()
    rollout = Rollout(drafter, target, Objective(num_offsets=4))
    num_targets = rollout.num_targets(batch_of(first)) + rollout.num_targets(batch_of(second))

    for documents in (first, second):
        rollout(batch_of(documents), num_targets).loss.backward()
    accumulated = [parameter.grad.clone() for parameter in drafter.parameters() if parameter.grad is not None]
    drafter.zero_grad(set_to_none=True)
    step(rollout, batch_of(first + second)).loss.backward()

    for found, parameter in zip(accumulated, drafter.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_batch_without_targets_gives_zero_and_no_nan() -> None:
    target, drafter = make_target(), make_drafter()

    report = step(Rollout(drafter, target, Objective()), batch_of(make_documents(6, num_prompt_tokens=6)))

    assert report.loss == 0
    assert not report.loss_sums.isnan().any()
    assert report.num_correct.sum() == 0


def test_accuracy_counts_targets_among_the_best_tokens() -> None:
    documents, target, drafter = make_documents(15, 11), make_target(), make_drafter(draft_vocab_size=VOCAB // 2)
    objective = Objective(num_offsets=2, reach=0)

    report = step(Rollout(drafter, target, objective), batch_of(documents))

    ids = drafter.target_ids()
    assert ids is not None
    counted = torch.zeros(2, TOP_K)
    for document in documents:
        hidden = target.hidden(document.token_ids)
        for start in range(len(document.token_ids) - 2):
            state = drafter.start(hidden[start])
            for offset in range(min(2, len(document.token_ids) - 2 - start)):
                state = drafter.advance(state, target.embed(document.token_ids[start + 1 + offset]))
                best = ids[drafter.logits(state).topk(TOP_K).indices].tolist()
                token = int(document.token_ids[start + 2 + offset])
                if document.is_target[start + 2 + offset] and token in best:
                    counted[offset, best.index(token) :] += 1
    assert counted.sum() > 0
    assert report.num_correct.tolist() == counted.tolist()


def test_with_only_own_tokens_the_state_reads_the_drafters_best_tokens() -> None:
    document, target, drafter = make_documents(8)[0], make_target(), make_drafter()
    objective = Objective(num_offsets=3, own_tokens=1.0, reach=0)

    report = step(Rollout(drafter, target, objective), batch_of([document]))

    logits = target.model(document.token_ids[None]).logits[0]
    hidden = target.hidden(document.token_ids)
    expected = torch.zeros(3)
    for start in range(6):
        state = drafter.start(hidden[start])
        read = int(document.token_ids[start + 1])
        for offset in range(min(3, 6 - start)):
            state = drafter.advance(state, target.embed(torch.tensor(read)))
            log_q = drafter.logits(state).log_softmax(dim=-1)
            log_p = logits[start + 1 + offset].log_softmax(dim=-1)
            expected[offset] += (log_p.exp() * (log_p - log_q)).sum().item()
            read = int(log_q.argmax())
    torch.testing.assert_close(report.loss_sums, expected, rtol=1e-4, atol=1e-4)


def test_own_tokens_come_in_gradually() -> None:
    batch, target, drafter = batch_of(make_documents(30)), make_target(), make_drafter()
    plain = step(Rollout(drafter, target, Objective()), batch)
    rollout = Rollout(drafter, target, Objective(own_tokens=1.0))

    at_start = rollout(batch, rollout.num_targets(batch), progress=0.0)
    at_end = rollout(batch, rollout.num_targets(batch), progress=1.0)

    assert torch.equal(at_start.loss_sums, plain.loss_sums)
    assert at_end.loss_sums[0] == plain.loss_sums[0]
    assert not torch.equal(at_end.loss_sums[1:], plain.loss_sums[1:])


class Scripted(nn.Module):
    """Stands for a drafter: its logits are given by offset and position."""

    class Config(NamedTuple):
        vocab_size: int
        head_size: int
        fused_layers: None = None

    def __init__(self, logits: torch.Tensor) -> None:  # [offsets, positions, vocab_size]
        super().__init__()
        self.table = nn.Parameter(logits)
        self.config = self.Config(logits.shape[-1], logits.shape[-1])

    def target_ids(self) -> None:
        return None

    def start(self, hidden: torch.Tensor) -> DraftState:
        return DraftState(hidden, torch.full_like(hidden, -1))

    def advance(self, state: DraftState, embedding: torch.Tensor) -> DraftState:
        return DraftState(state.context, state.recurrent + 1)

    def logits(self, state: DraftState) -> torch.Tensor:
        offsets = state.recurrent[..., 0].long()
        return self.table[offsets, state.context[..., 0].long().expand_as(offsets)]


class Counting:
    """Stands for a target whose hidden state at a position is the position."""

    def read(self, batch: Batch, fused_layers: None) -> TargetView:
        positions = batch.position_ids[..., None].float()
        return TargetView(positions, positions)


def test_the_loss_of_apples_own_example_is_theirs() -> None:
    logits = torch.tensor(
        [
            [
                -4.2755,
                -4.0159,
                -5.4326,
                -7.3534,
                -5.2731,
                -4.7144,
                -6.3034,
                -5.6929,
                -4.1427,
                -4.4837,
                -4.3300,
                -6.1975,
            ],
            [
                -5.6221,
                -2.1564,
                -5.9357,
                -2.7976,
                -5.3193,
                -4.0888,
                -4.9951,
                -4.7358,
                -6.5123,
                -4.8608,
                -4.8744,
                -6.2276,
            ],
        ]
    ).reshape(2, 4, 3)
    batch = Batch(
        torch.tensor([[0, 1, 2, 1]]), torch.ones(1, 4, dtype=torch.bool), torch.arange(4)[None], torch.tensor([0])
    )
    rollout = Rollout(Scripted(logits), Counting(), Objective(loss="ce", num_offsets=2))  # type: ignore[arg-type]

    report = step(rollout, batch)

    assert report.loss.item() == pytest.approx(1.6388, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"loss": "mse"}, "loss is 'mse', but it must be one of ce, kl, lk"),
        ({"num_offsets": 0}, "num_offsets is 0, but it must be at least 1"),
        ({"chunk_size": 0}, "chunk_size is 0, but it must be at least 1"),
        ({"decay": 0.0}, "decay is 0.0, but it must be above 0"),
        ({"own_tokens": 1.5}, "own_tokens is 1.5, but it is a probability: it must lie in 0..1"),
        ({"reach": -0.1}, "reach is -0.1, but it is a probability: it must lie in 0..1"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("(", r"\(").replace(".", r"\.")):
        replace(Objective(), **fields)
