from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.small import HIDDEN, make_documents, make_drafter, make_target
from vllm_redrafter.core.checkpoint import load_drafter
from vllm_redrafter.training.batch import Batch, collate
from vllm_redrafter.training.evaluation import accuracies
from vllm_redrafter.training.memory import HiddenMemory
from vllm_redrafter.training.packing import PackedSequence, pack
from vllm_redrafter.training.recipe import Recipe
from vllm_redrafter.training.rollout import Objective, Rollout
from vllm_redrafter.training.run import train

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


def test_a_rollout_that_remembers_sees_the_same_without_running_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter, batch = make_target(), make_drafter(fused_layers=[0]), batch_of(0, 1)
    expected = Rollout(drafter, target, Objective())._view(batch)
    remembering = Rollout(drafter, target, Objective(), HiddenMemory(1 << 30))

    found = [remembering._view(batch)]
    monkeypatch.setattr(target, "_decoder", None)
    found.append(remembering._view(batch))

    for view in found:
        assert torch.equal(view.hidden, expected.hidden)
        assert torch.equal(view.embeddings, expected.embeddings)


def test_what_is_remembered_is_rounded_alike_the_first_time_and_later() -> None:
    memory, compute = HiddenMemory(1 << 30), lambda batch: torch.randn(*batch.token_ids.shape, HIDDEN)

    with torch.autocast("cpu", torch.bfloat16):
        first, second = memory.read(batch_of(0), compute), memory.read(batch_of(0), compute)

    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second)


def test_what_one_training_remembers_another_does_not_see(tmp_path: Path) -> None:
    target = make_target()
    recipe = Recipe(max_length=32, epochs=2, batch_size=2, num_evaluations=1, bf16=False)
    tokenizer: Any = None
    train(target, tokenizer, make_documents(*[20, 14, 30, 9] * 6), tmp_path, recipe, verifier="someone/target")
    drafter, documents = load_drafter(tmp_path), make_documents(20, 14, 30, 9, seed=1)

    found = accuracies(drafter, target, documents)

    assert found == accuracies(drafter, make_target(), documents)
