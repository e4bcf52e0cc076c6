"""Packed documents side by side, and which of their tokens a drafter can be asked to predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from vllm_redrafter.training.packing import PackedSequence

_LENGTH_STEP = 64
"""Batches are padded to a multiple of it: libraries keep what they prepared for every size of a product."""


class Batch(NamedTuple):
    """Sequences of one length; what pads the shorter ones is a document of its own without targets."""

    token_ids: torch.Tensor  # [sequences, length] int64
    is_target: torch.Tensor  # [sequences, length] bool
    position_ids: torch.Tensor  # [sequences, length]: starts anew at 0 with every document
    numbers: torch.Tensor  # [sequences]: places in the data


def collate(sequences: Sequence[PackedSequence]) -> dict[str, torch.Tensor]:
    """Return the fields of a `Batch` under their names, as a data loader hands them to a trainer."""
    longest = max(len(sequence.token_ids) for sequence in sequences)
    length = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
    columns: list[list[torch.Tensor]] = [[], [], []]
    for sequence in sequences:
        padding = length - len(sequence.token_ids)
        columns[0].append(functional.pad(sequence.token_ids, (0, padding)))
        columns[1].append(functional.pad(sequence.is_target, (0, padding)))
        columns[2].append(torch.cat((sequence.position_ids, torch.arange(padding))))
    numbers = torch.tensor([sequence.number for sequence in sequences])
    token_ids, is_target, position_ids = (torch.stack(column) for column in columns)
    return Batch(token_ids, is_target, position_ids, numbers)._asdict()


def predictable(batch: Batch, num_offsets: int) -> torch.Tensor:
    """Return which tokens count as targets of which offset, [num_offsets, sequences, length].

    Offset i (from 0) predicts token p from the hidden state at p - 2 - i: that position must lie in the document of p.
    Source: Apple's training loss, with documents in the place of samples.
    """
    distances = 2 + torch.arange(num_offsets, device=batch.token_ids.device)
    return batch.is_target & (batch.position_ids >= distances[:, None, None])
