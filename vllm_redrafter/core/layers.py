"""What leaves single decoder layers of a Hugging Face model: overheard, so that a forward keeps nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def find_layers(model: PreTrainedModel, indices: Sequence[int]) -> list[nn.Module]:
    """Return the decoder layers with these indices.

    Raises:
        ValueError: the model has no such layer.
        NotImplementedError: its layers are not one list of modules.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    if max(indices) >= num_layers:
        raise ValueError(
            f"the layers {', '.join(map(str, indices))} are to be fused, but the target's are 0 to {num_layers - 1}: "
            "choose from those, or use a drafter that was trained for this target"
        )
    decoder: Any = model.get_decoder()
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return [child[index] for index in indices]
    raise NotImplementedError(
        f"no list of {num_layers} layers was found in {type(model).__name__}: use a drafter without fused_layers"
    )


@contextmanager
def outputs_of(model: PreTrainedModel, indices: Sequence[int] | None) -> Iterator[list[torch.Tensor]]:
    """Yield a list that a forward fills with what leaves these layers, [batch, length, hidden_size] each.

    That is the residual stream behind a layer; behind the last one, before the final norm.

    Args:
        indices: ascending, which is the order of the list too; None for none.

    Raises:
        ValueError, NotImplementedError: as `find_layers`.
    """
    outputs: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        # some architectures return attention weights along
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    hooks = [layer.register_forward_hook(keep) for layer in find_layers(model, indices)] if indices else []
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
