from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from vllm_redrafter.training.documents import Document
from vllm_redrafter.training.packing import PackedSequence, pack

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "qwen3": Qwen3Config(**SIZES),
    # windows shorter than the documents, and than a packed sequence
    "gemma2": Gemma2Config(**SIZES, sliding_window=5),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
}


def make_documents(lengths: list[int]) -> list[Document]:
    """Return documents of these lengths; no token occurs in two places."""
    documents = []
    first = 0
    for length in lengths:
        token_ids = torch.arange(first, first + length)
        documents.append(Document(token_ids, token_ids % 3 == 0, "test"))
        first += length
    return documents


def split(sequence: PackedSequence) -> list[tuple[list[int], list[bool]]]:
    """Return tokens and targets of the parts of a sequence, which begin where the positions do."""
    starts = (sequence.position_ids == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], len(sequence.token_ids)]
    return [
        (sequence.token_ids[start:end].tolist(), sequence.is_target[start:end].tolist())
        for start, end in zip(starts, ends, strict=True)
    ]


@given(st.lists(st.integers(1, 16), max_size=40))
@settings(max_examples=60, deadline=None)
def test_every_document_is_in_one_place_and_whole(lengths: list[int]) -> None:
    documents = make_documents(lengths)

    sequences = pack(documents, 16)

    parts = [part for sequence in sequences for part in split(sequence)]
    expected = [(document.token_ids.tolist(), document.is_target.tolist()) for document in documents]
    assert sorted(parts) == sorted(expected)
    for sequence in sequences:
        assert len(sequence.token_ids) <= 16
        positions = [position for token_ids, _ in split(sequence) for position in range(len(token_ids))]
        assert sequence.position_ids.tolist() == positions
    # two sequences that fit into one would be one
    sizes = sorted(len(sequence.token_ids) for sequence in sequences)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 16
    assert all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(sequences, pack(documents, 16), strict=True))


def test_a_document_goes_where_it_leaves_the_least_room() -> None:
    sequences = pack(make_documents([3, 7, 6, 4, 10]), 10)

    assert [[len(token_ids) for token_ids, _ in split(sequence)] for sequence in sequences] == [[10], [3, 7], [6, 4]]


def test_a_document_that_fits_no_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="a document has 9 tokens, but a sequence holds 8: cut it first"):
        pack(make_documents([3, 9]), 8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_packed_document_has_the_hidden_states_of_its_own_forward(config: PretrainedConfig, attention: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().double()
    documents = make_documents([1, 13, 9, 1, 8])
    (sequence,) = pack(documents, 32)
    # none is first in its sequence and last in the list
    order = [part[0] for part in split(sequence)]

    with torch.no_grad():
        packed = model.base_model(
            input_ids=sequence.token_ids[None], position_ids=sequence.position_ids[None], use_cache=False
        ).last_hidden_state[0]
        alone = [
            model.base_model(input_ids=torch.tensor([token_ids]), use_cache=False).last_hidden_state[0]
            for token_ids in order
        ]
        mixed = model.base_model(input_ids=sequence.token_ids[None], use_cache=False).last_hidden_state[0]

    # norms and eager attention's softmax are float32 whatever the model is
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)
    assert (mixed - torch.cat(alone)).abs().max() > 1e-3
