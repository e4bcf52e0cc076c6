from __future__ import annotations

import pytest
import torch

from tests.training.small import HIDDEN, make_documents, make_target
from vllm_redrafter.training.batch import Batch, collate
from vllm_redrafter.training.memory import HiddenMemory
from vllm_redrafter.training.packing import PackedSequence, pack

LENGTHS = [40, 100, 70, 130]
NUM_BYTES = 4 * 128 * HIDDEN  # of one that is padded to 128 tokens


class Counting:
    """Numbers of the sequences that were computed, batch by batch; hidden states are the tokens, a number and noise."""

    def __init__(self) -> None:
        self.computed: list[list[int]] = []

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.computed.append(batch.numbers.tolist())
        hidden = torch.zeros(*batch.token_ids.shape, HIDDEN)
        hidden[..., 0], hidden[..., 1] = batch.token_ids, batch.numbers[:, None]
        hidden[..., 2] = len(self.computed)
        return hidden


def sequences() -> list[PackedSequence]:
    # the longest come first, each alone
    return pack(make_documents(*LENGTHS), 130)


def batch_of(*numbers: int) -> Batch:
    return Batch(**collate([sequences()[number] for number in numbers]))


def test_sequences_are_numbered_through() -> None:
    assert [sequence.number for sequence in sequences()] == list(range(len(sequences())))
    assert batch_of(2, 0).numbers.tolist() == [2, 0]


def test_what_was_computed_once_is_not_computed_again() -> None:
    memory, compute = HiddenMemory(1 << 30), Counting()

    first = memory.read(batch_of(0, 1), compute)
    again = memory.read(batch_of(1, 0), compute)
    mixed = memory.read(batch_of(2, 1), compute)

    assert compute.computed == [[0, 1], [2]]
    assert torch.equal(again, first.flip(0))
    assert torch.equal(mixed[1], first[1, : mixed.shape[1]])
    assert mixed[0, :, 1].unique().tolist() == [2]


@pytest.mark.parametrize("numbers", [(0, 2), (2, 0)])
def test_padding_to_another_length_changes_nothing_of_a_text(numbers: tuple[int, int]) -> None:
    memory, compute = HiddenMemory(1 << 30), Counting()
    alone = memory.read(batch_of(2), compute)
    memory.read(batch_of(0), compute)

    beside_a_longer_one = memory.read(batch_of(*numbers), compute)

    length = len(sequences()[2].token_ids)
    assert beside_a_longer_one.shape[1] > alone.shape[1] > length
    assert torch.equal(beside_a_longer_one[numbers.index(2), :length], alone[0, :length])
    assert torch.equal(memory.read(batch_of(2), compute)[0, :length], alone[0, :length])
    assert compute.computed == [[2], [0]]


def test_what_does_not_fit_is_computed_every_time() -> None:
    # the first is padded to 192 tokens, the second to 128
    memory, compute = HiddenMemory(NUM_BYTES), Counting()

    for _ in range(2):
        memory.read(batch_of(0), compute)
        memory.read(batch_of(1), compute)

    assert compute.computed == [[0], [1], [0]]


@torch.no_grad()
def test_a_target_that_remembers_says_the_same_without_running_again(monkeypatch: pytest.MonkeyPatch) -> None:
    target, batch = make_target(), batch_of(0, 1)
    expected = target.read(batch, fused_layers=[0])
    target.remember(1 << 30)

    found = [target.read(batch, fused_layers=[0])]
    monkeypatch.setattr(target, "_decoder", None)
    found.append(target.read(batch, fused_layers=[0]))

    for view in found:
        assert torch.equal(view.hidden, expected.hidden)
        assert torch.equal(view.embeddings, expected.embeddings)


@torch.no_grad()
def test_what_is_remembered_is_rounded_alike_the_first_time_and_later() -> None:
    target, batch = make_target(), batch_of(0)
    target.remember(1 << 30)

    with torch.autocast("cpu", torch.bfloat16):
        first, second = target.read(batch), target.read(batch)

    assert first.hidden.dtype == torch.bfloat16
    assert torch.equal(first.hidden, second.hidden)
