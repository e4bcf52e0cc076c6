"""Makes a small model large without changing its function, so that a measurement pays for size and not for training.

The residual stream gets `factor` times as wide and is zero in the new columns:

    RMSNorm      mean(x²) shrinks by the factor: eps / factor and weight / sqrt(factor) give back what was there
    attention    new query heads read new key-value heads, whose keys and values are zero
    head size    i and i + d/2, which the rotary embedding turns as a pair, go to k·i and k·i + k·d/2, which it turns as
                 fast: θ^(-2ki/kd) = θ^(-2i/d); the scale shrinks from d^-½ to (kd)^-½: sqrt(k) times the queries
    MLP          new columns are zero, and so is SiLU(0)
    new layers   copies of the last one with zero `o_proj` and `down_proj`: they add nothing to the residual stream

Logits are those of the small model up to the order of summation and, unless factor and k are powers of 4, the rounding
of what their square roots scale to the dtype of the weights. A drafter is grown alongside: the target's hidden states
and embeddings are zero in the new columns, so padding its own weights with zeros leaves its drafts as they are. One
without an input projection gets as much wider as its target, blocks and head included; with `keep_exit` it gets a
projection onto the columns that are not zero instead, as one designed for a large target would have.
"""

from __future__ import annotations

import copy
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from vllm_redrafter.core import checkpoint
from vllm_redrafter.core.drafter import ReDrafter

_MODEL_TYPES = ("llama", "mistral")
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..+)")
_NORM = re.compile(r".*layernorm\.weight|model\.norm\.weight")
_RESIDUAL_WRITER = re.compile(r".*\.(?:o_proj|down_proj)\.(?:weight|bias)")
_QUERY = re.compile(r".*\.q_proj\.(?:weight|bias)")
_HEAD_WRITER = re.compile(r".*\.[qkv]_proj\.(?:weight|bias)")
_HEAD_READER = re.compile(r".*\.o_proj\.weight")


@dataclass(frozen=True)
class TargetShape:
    """What a target grows to; left out, layers double, head size and positions stay, the rest grows by `factor`."""

    factor: int
    """How many times as wide the residual stream becomes."""
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    intermediate_size: int | None = None
    head_size: int | None = None
    """A whole multiple of what it was; times the number of heads it need not be the hidden size."""
    num_positions: int | None = None
    """How many positions the grown model admits; its weights do not depend on it."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)


def grow_target(source: Path, output: Path, shape: TargetShape) -> int:
    """Write the grown model with its tokenizer and generation config; return its number of parameters.

    Raises:
        ValueError: the source is not Llama-like, or the shape does not hold it.
    """
    config = _read_config(source)
    grown_config = _grown_config(config, shape)
    _check_output(source, output)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    head_factor = grown_config.head_dim // _head_size(config)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in type(model)(grown_config).named_parameters()}
    state: dict[str, torch.Tensor] = {}
    for name, wanted in shapes.items():
        source_name = _source_name(name, config.num_hidden_layers)
        weight = weights[source_name]
        if source_name != name and _RESIDUAL_WRITER.fullmatch(name):
            weight = torch.zeros_like(weight)
        elif _NORM.fullmatch(name):
            weight = (weight.double() / math.sqrt(shape.factor)).to(weight.dtype)
        elif _QUERY.fullmatch(name):
            weight = (weight.double() * math.sqrt(head_factor)).to(weight.dtype)
        state[name] = _padded(weight, wanted, _steps(name, weight.ndim, head_factor))
    output.mkdir(parents=True, exist_ok=True)
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})
    grown_config.save_pretrained(output)
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, output / path.name)
    return sum(tensor.numel() for tensor in state.values())


def grow_drafter(source: Path, output: Path, factor: int, *, keep_exit: bool = False) -> int:
    """Write the drafter that drafts for the grown target what `source` drafts; return its number of parameters.

    Args:
        keep_exit: whether blocks and head keep their width where the drafter has no input projection.

    Raises:
        ValueError: `source` holds no drafter, or the factor does not suit it.
    """
    _check_factor(factor)
    drafter = checkpoint.load_drafter(source)
    _check_output(source, output)
    config = drafter.config
    if config.fused_layers:
        raise ValueError(
            f"the drafter fuses the layers {config.fused_layers}, whose outputs have another scale in a wider target: "
            "grow one without fused_layers"
        )
    hidden = config.hidden_size
    # where an entry of the small drafter lies in the grown one, by the axis that it belongs to
    pair = [*range(hidden), *range(factor * hidden, factor * hidden + hidden)]
    places = {"hidden": list(range(hidden)), "pair": pair, "exit": list(range(config.exit_dim))}
    grown_config = copy.deepcopy(config)
    grown_config.hidden_size = factor * hidden
    if config.tie_lm_head:
        grown_config.exit_dim = factor * hidden
    elif config.has_input_proj and not grown_config.has_input_proj:
        raise ValueError(
            f"factor {factor} would make the drafter's exit_dim, {config.exit_dim}, twice the hidden size, which means "
            "that there is no input projection: use another factor"
        )
    elif not config.has_input_proj and not keep_exit:
        grown_config.exit_dim = 2 * factor * hidden
        places["exit"] = pair

    state = drafter.state_dict()
    grown = ReDrafter(grown_config)
    if grown_config.has_input_proj and not config.has_input_proj:
        state |= {"input_proj.weight": torch.eye(config.exit_dim), "input_proj.bias": torch.zeros(config.exit_dim)}
    with torch.no_grad():
        for name, parameter in grown.named_parameters():
            parameter.zero_()
            small = state[name]
            axes = [places.get(axis, list(range(size))) for axis, size in zip(_axes(name), small.shape, strict=True)]
            parameter[torch.meshgrid(*(torch.tensor(axis) for axis in axes), indexing="ij")] = small
    for name, buffer in grown.named_buffers():
        buffer.copy_(state[name])
    checkpoint.save_drafter(grown, output)
    if (source / "tokenizer.json").is_file():
        shutil.copyfile(source / "tokenizer.json", output / "tokenizer.json")
    return sum(parameter.numel() for parameter in grown.parameters())


def _axes(name: str) -> tuple[str, ...]:
    """Return what the dimensions of a drafter's parameter stand for."""
    if name.startswith("input_proj"):
        axes = ("exit", "pair")
    elif name.startswith("rnn"):
        axes = ("hidden", "hidden")
    elif ".linear." in name:
        axes = ("exit", "exit")
    else:
        axes = ("vocabulary", "exit")
    return axes[:1] if name.endswith("bias") else axes


def _check_factor(factor: int) -> None:
    if factor < 1:
        raise ValueError(f"factor is {factor}, but a model can only grow: it must be at least 1")


def _check_output(source: Path, output: Path) -> None:
    if output.resolve() == source.resolve():
        raise ValueError(f"output {str(output)!r} is the source: pass another directory")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {str(output)!r} is a file: pass a directory")


def _read_config(source: Path) -> Any:
    if not (source / "config.json").is_file():
        raise ValueError(f"no config.json in {str(source)!r}: pass a directory that holds a target")
    # not by transformers: it knows no drafters, and says so at length
    model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ValueError(
            f"{str(source)!r} is a {model_type} model, but only {' and '.join(_MODEL_TYPES)} models "
            "can be grown: pass one of those"
        )
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{str(source)!r} is quantised, and zeros may not survive that: pass unquantised weights")
    return config


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _grown_config(config: Any, shape: TargetShape) -> Any:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    asked_for = {
        "num_hidden_layers": shape.num_layers or 2 * config.num_hidden_layers,
        "num_attention_heads": shape.num_heads or shape.factor * heads,
        "num_key_value_heads": shape.num_kv_heads or shape.factor * kv_heads,
        "intermediate_size": shape.intermediate_size or shape.factor * config.intermediate_size,
        "head_dim": shape.head_size or _head_size(config),
        "max_position_embeddings": shape.num_positions or config.max_position_embeddings,
    }
    grown = copy.deepcopy(config)
    grown.head_dim = _head_size(config)
    grown.hidden_size = shape.factor * config.hidden_size
    grown.rms_norm_eps = config.rms_norm_eps / shape.factor
    for name, size in asked_for.items():
        present = getattr(grown, name)
        if size < present:
            raise ValueError(f"{name} is {size}, but the model has {present} and can only grow: ask for more")
        setattr(grown, name, size)
    _check_rotary(config, grown)
    if grown.hidden_size % grown.num_attention_heads:
        raise ValueError(
            f"{grown.num_attention_heads} heads do not divide the grown hidden size of {grown.hidden_size}, as "
            "transformers asks for: use another number of heads or another factor"
        )
    # query head j reads key-value head j // group: with another group the heads that are there would change theirs
    if grown.num_attention_heads * kv_heads != grown.num_key_value_heads * heads:
        raise ValueError(
            f"{grown.num_attention_heads} heads over {grown.num_key_value_heads} KV heads is not the model's own ratio "
            f"of {heads} to {kv_heads}: keep {heads // kv_heads} heads per KV head"
        )
    return grown


def _check_rotary(config: Any, grown: Any) -> None:
    """Raise ValueError where the grown model would turn queries and keys by other angles."""
    head_size, num_positions = _head_size(config), config.max_position_embeddings
    rope = config.rope_parameters
    if grown.head_dim % head_size:
        raise ValueError(
            f"head_dim is {grown.head_dim}, but the model has {head_size} and heads grow by whole multiples: "
            f"ask for {head_size * math.ceil(grown.head_dim / head_size)}"
        )
    for name, present in (("head_dim", head_size), ("max_position_embeddings", num_positions)):
        if getattr(grown, name) != present and rope["rope_type"] != "default":
            raise ValueError(
                f"the model's rope_type is {rope['rope_type']!r}, whose angles may depend on {name}, which grows "
                f"with 'default' only: keep {present}"
            )
    # transformers turns whole heads of a Llama all the same, but vLLM does not
    if grown.head_dim != head_size and rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"the model's partial_rotary_factor is {rope['partial_rotary_factor']}, but head_dim grows only where the "
            f"whole head is turned: keep {head_size}"
        )


def _source_name(name: str, num_layers: int) -> str:
    """Return the parameter of the small model that a parameter of the grown one is made of."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    return f"{match[1]}{min(int(match[2]), num_layers - 1)}{match[3]}"


def _steps(name: str, ndim: int, head_factor: int) -> tuple[int, ...]:
    """Return how far apart the entries of a parameter come to lie, by axis: `head_factor` where heads are laid out."""
    # k times dimension i of head h, h·d + i, is dimension k·i of head h again: h·kd + k·i
    if _HEAD_WRITER.fullmatch(name):
        return (head_factor, 1)[:ndim]
    if _HEAD_READER.fullmatch(name):
        return (1, head_factor)
    return (1, 1)[:ndim]


def _padded(tensor: torch.Tensor, shape: torch.Size, steps: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor of `shape` with `tensor` in its first corner, entries `steps` apart, and zeros elsewhere."""
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(0, step * size, step) for size, step in zip(tensor.shape, steps, strict=True))] = tensor
    return padded
