"""A drafter is loaded beside its target, which lends it the token embedding and, where tied, the head."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_redrafter.core import checkpoint
from vllm_redrafter.core.drafter import Embed, ReDrafter

_MOST_FOLDED = 1 << 24
"""Numbers (tokens times hidden size) up to which the table of folded embeddings may take memory."""


class LoadedDrafter(NamedTuple):
    """A drafter that is ready to draft."""

    drafter: ReDrafter
    embed: Embed
    table: torch.Tensor | None
    """What `embed` looks up, [tokens, hidden_size]; None where it does more than that."""
    num_parameters: int
    """Those of the checkpoint."""


def load_beside(
    target: nn.Module, directory: Path, dtype: torch.dtype, device: torch.device | None = None
) -> LoadedDrafter:
    """Return the drafter of a directory, on the target's device.

    Raises:
        NotImplementedError: the target has no token embedding, or a quantised head that the drafter is tied to.
    """
    drafter = checkpoint.load_drafter(directory, dtype=dtype).to(device or torch.device("cpu"))
    num_parameters = sum(parameter.numel() for parameter in drafter.parameters())
    embedding = _find_module(target, VocabParallelEmbedding, exclude=ParallelLMHead)
    if drafter.config.tie_lm_head:
        drafter.tie_head(_full_head(target, embedding, drafter.config.vocab_size))
    folded = _folded(drafter, embedding, dtype, device)
    if folded is None:
        return LoadedDrafter(drafter, embedding, _table_of(embedding), num_parameters)
    return LoadedDrafter(drafter, partial(functional.embedding, weight=folded), folded, num_parameters)


@torch.inference_mode()
def _folded(drafter: ReDrafter, embed: Embed, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor | None:
    """Return the table of `W_w E(g)` where that of all tokens is small: it is looked up instead of computed."""
    config = drafter.config
    if not config.rnn or config.vocab_size * config.hidden_size > _MOST_FOLDED:
        return None
    return drafter.fold_embeddings(embed(torch.arange(config.vocab_size, device=device)).to(dtype))


def _table_of(embedding: nn.Module) -> torch.Tensor | None:
    """Return the weight of an embedding that is whole on this rank, and not quantised."""
    weight = embedding.weight
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    return weight.detach() if get_tensor_model_parallel_world_size() == 1 else None


def _find_module(target: nn.Module, kind: type[nn.Module], exclude: type[nn.Module]) -> nn.Module:
    """Return the first module of a kind: a decoder-only model of vLLM has one token embedding, and it comes first."""
    for module in target.modules():
        if isinstance(module, kind) and not isinstance(module, exclude):
            return module
    raise NotImplementedError(
        f"redrafter found no {kind.__name__} in {type(target).__name__}: it cannot draft for this architecture"
    )


def _full_head(target: nn.Module, embedding: nn.Module, vocab_size: int) -> torch.Tensor:
    """Return the target's whole head, [vocab_size, hidden_size], gathered from all ranks."""
    heads = [module for module in target.modules() if isinstance(module, ParallelLMHead)]
    weight = (heads[0] if heads else embedding).weight
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise NotImplementedError("the drafter's head is tied to the target's, but that head is quantised: untie it")
    if get_tensor_model_parallel_world_size() > 1:
        weight = tensor_model_parallel_all_gather(weight.contiguous(), dim=0)
    return weight[:vocab_size]
