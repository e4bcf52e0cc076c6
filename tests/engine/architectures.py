"""Tiny random targets of the architectures that vLLM's CPU kernels serve, and their checkpoints in other shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.engine.tiny_models import HIDDEN_SIZE, LLAMA, VOCAB_SIZE, make_llama

SLIDING_WINDOW = 48
GROUPED = {name: value for name, value in LLAMA.items() if name != "tie_word_embeddings"}
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def make_qwen2() -> PreTrainedModel:
    """Return a Qwen2: biases on queries, keys and values, tied embeddings."""
    return _seeded(lambda: Qwen2ForCausalLM(_config(Qwen2Config, tie_word_embeddings=True)))


def make_qwen3() -> PreTrainedModel:
    """Return a Qwen3: queries and keys are normalised."""
    return _seeded(lambda: Qwen3ForCausalLM(_config(Qwen3Config, tie_word_embeddings=False)))


def make_mistral() -> PreTrainedModel:
    """Return a Mistral that sees `SLIDING_WINDOW` tokens in every layer."""
    return _seeded(lambda: MistralForCausalLM(_config(MistralConfig, sliding_window=SLIDING_WINDOW)))


def make_gemma2() -> PreTrainedModel:
    """Return a Gemma 2: two kinds of layers, scores and logits softly capped, embeddings scaled."""
    config = _config(
        Gemma2Config,
        num_hidden_layers=4,
        layer_types=MIXED_LAYERS,
        sliding_window=SLIDING_WINDOW,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=30.0,
        # torch's own attention has no soft cap
        attn_implementation="eager",
    )
    return _with_loud_layers(_seeded(lambda: Gemma2ForCausalLM(config)))


def make_gemma3() -> PreTrainedModel:
    """Return the text model of a Gemma 3: two kinds of layers with rotations of their own, embeddings scaled."""
    config = _config(
        Gemma3TextConfig,
        num_hidden_layers=4,
        layer_types=MIXED_LAYERS,
        sliding_window=SLIDING_WINDOW,
        query_pre_attn_scalar=32,
    )
    return _with_loud_layers(_seeded(lambda: Gemma3ForCausalLM(config)))


def make_gpt2() -> PreTrainedModel:
    """Return a GPT-2: learned positions, tied embeddings, heads of 32."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=HIDDEN_SIZE,
        n_layer=2,
        n_head=2,
        n_positions=512,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _seeded(lambda: GPT2LMHeadModel(config))


TARGETS: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama with as many key as query heads": lambda: make_llama(num_key_value_heads=2),
    "Qwen2": make_qwen2,
    "Qwen3": make_qwen3,
    "Mistral with a sliding window": make_mistral,
    "Gemma 2": make_gemma2,
    "Gemma 3": make_gemma3,
    "GPT-2": make_gpt2,
}


def quantize_to_int8(source: Path, directory: Path) -> str:
    """Write a Llama's checkpoint with linear layers in int8, activations quantised per token; return where.

    The format is the one of `compressed-tensors`: one scale per output channel, weights symmetric.
    """

    def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}

    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    described = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
            }
        },
    }
    return _save_quantized(source, directory, quantize, described)


GROUP_SIZE = 32
"""Input channels with a scale of their own, where weights have 4 bits."""


def quantize_to_gptq(source: Path, directory: Path) -> str:
    """Write a Llama's checkpoint with linear layers in 4 bits as GPTQ stores them, symmetric; return where.

    Eight neighbours among the input channels share a word, the first one in the lowest bits.
    """

    def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = _groups(weight)  # [groups, GROUP_SIZE, outputs]
        scales = groups.abs().amax(dim=1) / 7
        numbers = (groups / scales[:, None]).round().clamp(-8, 7).int() + 8
        num_inputs, num_outputs = weight.shape[::-1]
        return {
            "qweight": _packed(numbers.view(num_inputs // 8, 8, num_outputs).movedim(1, -1)),
            "qzeros": _packed(torch.full((len(groups), num_outputs // 8, 8), 7)),  # one less than what is subtracted
            "scales": scales,
            "g_idx": (torch.arange(num_inputs) // GROUP_SIZE).int(),
        }

    described = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "desc_act": False, "sym": True}
    return _save_quantized(source, directory, quantize, described)


def quantize_to_awq(source: Path, directory: Path) -> str:
    """Write a Llama's checkpoint with linear layers in 4 bits as AWQ stores them, with zero points; return where.

    Eight neighbours among the output channels share a word, the even ones in its lower half.
    """

    def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = _groups(weight)  # [groups, GROUP_SIZE, outputs]
        lowest, highest = groups.amin(dim=1).clamp(max=0), groups.amax(dim=1).clamp(min=0)
        scales = (highest - lowest) / 15
        zeros = (-lowest / scales).round().int()
        numbers = ((groups / scales[:, None]).round().int() + zeros[:, None]).clamp(0, 15)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return {
            "qweight": _packed(numbers.flatten(0, 1).unflatten(-1, (-1, 8))[..., order]),
            "qzeros": _packed(zeros.unflatten(-1, (-1, 8))[..., order]),
            "scales": scales,
        }

    described = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm"}
    return _save_quantized(source, directory, quantize, described)


def _groups(weight: torch.Tensor) -> torch.Tensor:  # [outputs, inputs] -> [groups, GROUP_SIZE, outputs]
    return weight.T.unflatten(0, (-1, GROUP_SIZE))


def _packed(numbers: torch.Tensor) -> torch.Tensor:  # [..., 8] of 4 bits -> [...] int32
    shifted = numbers.to(torch.int64) << 4 * torch.arange(8)
    return shifted.sum(dim=-1).to(torch.uint32).view(torch.int32)


def _save_quantized(
    source: Path,
    directory: Path,
    quantize: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    described: dict[str, Any],
) -> str:
    """Write a checkpoint whose linear layers `quantize` turns into tensors by their last names; return where."""
    directory.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json" and path.name != "config.json":
            (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        prefix = name.removesuffix("weight")
        tensors |= {prefix + last: tensor.contiguous() for last, tensor in quantize(tensors.pop(name)).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = described
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(directory)


def save_random_lora(
    directory: Path, model: PreTrainedModel, rank: int = 8, seed: int = 5, more: Sequence[str] = ()
) -> str:
    """Write a LoRA adapter that changes what a Llama says, on `more` of its layers than usual; return where."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    projections = ("q_proj", "v_proj", "o_proj", "down_proj", *more)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(projections):
            rows, columns = module.weight.shape
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = 0.3 * torch.randn(rank, columns, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = 0.3 * torch.randn(rows, rank, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(projections), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return str(directory)


def _config(kind: Callable[..., Any], **changes: Any) -> Any:
    return kind(**{**GROUPED, **changes})


def _seeded(make: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return make().eval().requires_grad_(False)


def _with_loud_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Return a Gemma whose layers drown the scaled embedding, which its tied head would only repeat."""
    for name, parameter in model.named_parameters():
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            parameter.fill_(10.0)
    return model
