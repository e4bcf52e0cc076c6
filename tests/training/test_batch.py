"""Which token is a target of which offset: Apple's alignment, with documents in the place of samples."""

from __future__ import annotations

import torch

from tests.training.small import make_documents
from vllm_redrafter.training.batch import Batch, collate, predictable
from vllm_redrafter.training.packing import pack


def test_the_alignment_is_that_of_six_tokens_and_two_offsets() -> None:
    """Offset 0 pairs t = 0..3 with tokens 2..5, offset 1 pairs t = 0..2 with tokens 3..5."""
    batch = Batch(torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool), torch.arange(6)[None], torch.tensor([0]))

    valid = predictable(batch, 2)

    assert valid[0, 0].nonzero()[:, 0].tolist() == [2, 3, 4, 5]
    assert valid[1, 0].nonzero()[:, 0].tolist() == [3, 4, 5]


def test_nothing_is_predicted_across_a_documents_edge_or_in_padding() -> None:
    sequences = pack(make_documents(5, 4, num_prompt_tokens=0), 9) + pack(make_documents(3, num_prompt_tokens=0), 9)

    batch = Batch(**collate(sequences))

    assert batch.token_ids.shape == (2, 64)
    starts = batch.position_ids == 0
    assert starts.nonzero().tolist() == [[0, 0], [0, 5], [0, 9], [1, 0], [1, 3]]
    for offset, rows in enumerate(predictable(batch, 3)):
        for row, position in rows.nonzero().tolist():
            assert not starts[row, position - 1 - offset : position + 1].any()
            assert position < (9 if row == 0 else 3)


def test_only_targets_are_predicted_but_prompts_are_read() -> None:
    batch = Batch(**collate(pack(make_documents(6, num_prompt_tokens=4), 6)))

    assert predictable(batch, 4)[:, 0].nonzero().tolist() == [[0, 4], [0, 5], [1, 4], [1, 5], [2, 4], [2, 5], [3, 5]]
