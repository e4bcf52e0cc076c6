"""What leaves single layers of the target, kept where a draft finds it.

vLLM's runner asks targets for it on behalf of its own methods only. Here the target is asked and its forward overheard:
what it hands out beside the hidden states is copied into memory that stays, by a kernel that CUDA graphs of the target
hold too, and the runner gets the hidden states alone, as it expects.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class LayerOutputs:
    """The outputs of some layers in the target's last forward."""

    def __init__(
        self,
        target: nn.Module,
        layers: tuple[int, ...],
        max_num_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Ask a target for them, before its first forward: what is compiled hands out what it did when it was compiled.

        Args:
            target: a model of vLLM's with the interface for EAGLE-3.
            layers: as vLLM counts them.
        """
        self.rows = torch.zeros(max_num_tokens, len(layers) * hidden_size, dtype=dtype, device=device)
        """By row of the batch, the outputs of all layers side by side."""
        target.set_aux_hidden_state_layers(layers)  # type: ignore[operator]
        target.register_forward_hook(self._keep)

    def _keep(self, target: nn.Module, inputs: Any, output: tuple[torch.Tensor, list[torch.Tensor]]) -> torch.Tensor:
        hidden, outputs = output
        torch.cat(outputs, dim=-1, out=self.rows[: len(hidden)])
        return hidden
