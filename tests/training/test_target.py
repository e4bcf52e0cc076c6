"""Whatever the architecture, training sees what serving hands the drafter: the input of the target's own head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.training.small import HIDDEN, SIZES, VOCAB, make_documents, make_drafter, make_target
from vllm_redrafter.core.decoding import Target
from vllm_redrafter.training.batch import Batch, collate
from vllm_redrafter.training.packing import pack
from vllm_redrafter.training.rollout import Objective, Rollout

ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=4),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "gemma2 with a soft cap": Gemma2Config(**SIZES, head_dim=4, final_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=4),
    "phi with a bias": PhiConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_hidden_states_of_training_are_those_that_decoding_hands_the_drafter(name: str) -> None:
    target = make_target(ARCHITECTURES[name])
    documents = make_documents(12, 7)
    batch = Batch(**collate(pack(documents, 19)))

    view = target.read(batch, fused_layers=[0, 1])

    # the last one is padding's
    starts = (batch.position_ids[0] == 0).nonzero()[:-1, 0].tolist()
    for start, document in zip(starts, documents, strict=True):
        reading = Target(target.model, max_length=len(document.token_ids), fused_layers=[0, 1])
        seen = reading.read(document.token_ids)
        part = slice(start, start + len(document.token_ids))
        assert seen.hidden.shape[-1] == 3 * HIDDEN
        # packed or alone, attention sums in another order
        torch.testing.assert_close(view.hidden[0, part], seen.hidden, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(view.embeddings[0, part], reading.embed(document.token_ids))
        expected = seen.logits.float().log_softmax(dim=-1)
        last_hidden = view.hidden[0, part, :HIDDEN]
        torch.testing.assert_close(target.logits(last_hidden).log_softmax(dim=-1), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(target.hidden(document.token_ids, [0, 1]), seen.hidden, rtol=1e-4, atol=1e-5)
        assert torch.equal(target.read(batch).hidden, view.hidden[..., :HIDDEN])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_head_check_passes_where_the_teacher_is_right(name: str) -> None:
    target = make_target(ARCHITECTURES[name])

    target.check_head()


def test_a_target_that_scales_its_logits_is_refused_as_a_teacher_and_taken_for_cross_entropy() -> None:
    config: Any = CohereConfig(**{**SIZES, "num_key_value_heads": 4}, logit_scale=0.25)
    target, drafter = make_target(config), make_drafter()

    with pytest.raises(NotImplementedError, match=r"CohereForCausalLM does more to its logits .* use --loss ce"):
        Rollout(drafter, target, Objective(loss="kl"))
    Rollout(drafter, target, Objective(loss="ce"))


def test_embeddings_are_the_tables_rows_where_the_model_scales_them() -> None:
    target = make_target(ARCHITECTURES["gemma2 with a soft cap"])
    token_ids = torch.tensor([3, 1, 4])

    embedding: Any = target.model.get_input_embeddings()

    assert torch.equal(target.embed(token_ids), functional.embedding(token_ids, embedding.weight))
    assert not torch.allclose(target.embed(token_ids), embedding(token_ids))
