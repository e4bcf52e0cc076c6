"""A target of a few thousand weights and documents in its vocabulary, for tests of training."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.training.documents import Document
from vllm_redrafter.training.target import FrozenTarget

HIDDEN = 16
VOCAB = 50
DRAFT_IDS = torch.arange(0, VOCAB, 2)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}


def make_target(config: PretrainedConfig | None = None, seed: int = 0) -> FrozenTarget:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES, eos_token_id=None))
    return FrozenTarget(model)


def make_drafter(seed: int = 0, **fields: object) -> ReDrafter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drafter = ReDrafter(ReDrafterConfig(**{"hidden_size": HIDDEN, "vocab_size": VOCAB, **fields}))
        for parameter in drafter.parameters():
            nn.init.normal_(parameter, std=0.4)
    if drafter.config.draft_vocab_size is not None:
        drafter.set_draft_vocabulary(DRAFT_IDS)
    return drafter


def make_documents(*lengths: int, num_prompt_tokens: int = 2, seed: int = 0) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Document(
            torch.randint(VOCAB, (length,), generator=generator), torch.arange(length) >= num_prompt_tokens, "test"
        )
        for length in lengths
    ]
