"""Random models and drafters: so small that drafts are accepted now and then, and exact on MLX's CPU backend.

There a matrix product does not depend on the number of rows, so what a tree yields is compared with `==`.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.generate import generate_step as stock_generate_step

from mlx_port.beam_search import BeamShape
from mlx_port.config import ReDrafterConfig
from mlx_port.decoding import generate_step
from mlx_port.drafter import ReDrafter
from mlx_port.plan import Plan
from mlx_port.target import Target
from mlx_port.telemetry import Telemetry

HIDDEN = 64
VOCAB = 11
PROMPT = [1, 5, 2, 9, 3, 3, 7]
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "model_type": "llama"},
    "llama, untied": {**SIZES, "model_type": "llama", "tie_word_embeddings": False},
    "mistral, window of 12": {
        **SIZES,
        "model_type": "llama",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 12,
    },
    "qwen2": {**SIZES, "model_type": "qwen2"},
    "qwen3": {**SIZES, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True, "rope_theta": 10000.0},
    "mixtral": {**SIZES, "model_type": "mixtral", "num_local_experts": 4},
    "gemma2": {**SIZES, "model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 32.0},
    "gemma3": {
        **SIZES,
        "model_type": "gemma3_text",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 12,
        "sliding_window_pattern": 2,
    },
    "phi3": {**SIZES, "model_type": "phi3"},
    "gpt_neox": {
        **SIZES,
        "model_type": "gpt_neox",
        "num_key_value_heads": 2,
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.5,
    },
    "deepseek_v2": {
        **SIZES,
        "model_type": "deepseek_v2",
        "num_key_value_heads": 2,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 128,
            "type": "yarn",
        },
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_ctx": 512,
        "n_embd": HIDDEN,
        "n_head": 2,
        "n_layer": 2,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": VOCAB,
    },
}


def make_model(config: dict[str, Any], dtype: mx.Dtype = mx.float32, bits: int | None = None) -> nn.Module:
    """Return a model of mlx-lm with random weights."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict(config))
    # far apart logits that depend on the context: with MLX's own initial weights every token looks like the last one
    model.update(tree_map(_spread, model.parameters()))
    model.set_dtype(dtype)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    mx.eval(model.parameters())
    return model


def _spread(array: mx.array) -> mx.array:
    if array.ndim < 2:
        return array
    # small embeddings: a tied head would else repeat the last token for ever
    scale = 0.3 if len(array) == VOCAB else 2
    return mx.random.normal(array.shape) * (scale / array.shape[-1]) ** 0.5


@cache
def make_target(name: str = "llama", bits: int | None = None) -> Target:
    return Target(make_model(CONFIGS[name], bits=bits))


@cache
def make_drafter(**changes: Any) -> ReDrafter:
    mx.random.seed(4)
    sizes = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "exit_dim": 2 * HIDDEN, "num_draft_layers": 1}
    drafter = ReDrafter(ReDrafterConfig(**{**sizes, **changes}))
    mx.eval(drafter.parameters())
    return drafter


def make_plan(width: int, length: int, num_nodes: int) -> Plan:
    return Plan(BeamShape(width, length), num_nodes)


def alone(target: Target, prompt: list[int], num_tokens: int, **options: Any) -> list[int]:
    """Return what mlx-lm makes of a prompt without us."""
    steps = stock_generate_step(mx.array(prompt), target.model, max_tokens=num_tokens, **options)
    return [token_id for token_id, _ in steps]


def drafted(target: Target, prompt: list[int], num_tokens: int, **options: Any) -> tuple[list[int], Telemetry]:
    """Return what we make of it, and the counters."""
    telemetry = Telemetry()
    drafter = options.pop("drafter", None) or make_drafter()
    steps = generate_step(mx.array(prompt), target, drafter, max_tokens=num_tokens, telemetry=telemetry, **options)
    return [token_id for token_id, _, _ in steps], telemetry
