"""Several documents in one sequence, so that no step computes padding.

A packed sequence goes into a model of transformers with its `position_ids`, without an attention mask and without a
cache (`use_cache=False`): every new start of the positions is a new document there, and no document sees another.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_redrafter.training.documents import Document


class PackedSequence(NamedTuple):
    """Whole documents one after another."""

    token_ids: torch.Tensor  # [length] int64
    is_target: torch.Tensor  # [length] bool
    position_ids: torch.Tensor  # [length] int64, from 0 in every document
    number: int
    """Its place among all of the data's."""


def pack(documents: Sequence[Document], max_length: int) -> list[PackedSequence]:
    """Return sequences of at most `max_length` tokens that hold every document once, undivided.

    Best fit, the longest first: each goes where it leaves the least room. The same documents give the same sequences.

    Raises:
        ValueError: a document is longer than `max_length`.
    """
    lengths = [len(document.token_ids) for document in documents]
    if documents and max(lengths) > max_length:
        raise ValueError(f"a document has {max(lengths)} tokens, but a sequence holds {max_length}: cut it first")
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # tokens free and which bin, the fullest first
    for index in sorted(range(len(documents)), key=lambda index: -lengths[index]):
        length = lengths[index]
        place = bisect_left(rooms, (length, 0))
        if place == len(rooms):
            room, number = max_length, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(place)
        bins[number].append(index)
        insort(rooms, (room - length, number))
    return [_join([documents[index] for index in sorted(members)], number) for number, members in enumerate(bins)]


def _join(documents: Sequence[Document], number: int) -> PackedSequence:
    return PackedSequence(
        torch.cat([document.token_ids for document in documents]),
        torch.cat([document.is_target for document in documents]),
        torch.cat([torch.arange(len(document.token_ids)) for document in documents]),
        number,
    )
