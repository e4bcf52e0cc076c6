"""The drafter's matrices in 8 bits, for CPUs: a search reads all of them at every depth, and reading is what it costs.

Weights are rounded per output, activations stay as they are. What rounding loses is acceptance, never output.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from vllm_redrafter.core.drafter import ReDrafter


class Int8Linear(nn.Module):
    """A linear layer whose row i is `scales[i]` times integers of -127..127."""

    weight: torch.Tensor  # [outputs, inputs] int8
    scales: torch.Tensor  # [outputs]

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (weight / scales[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scales.to(weight.dtype))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., inputs] -> [..., outputs]
        """Return the products, of the input's type."""
        rows = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scales)
        products: torch.Tensor = rows.reshape(*x.shape[:-1], len(self.weight))
        return products if self.bias is None else products + self.bias


def quantized(drafter: ReDrafter) -> ReDrafter:
    """Return a copy in bf16 whose matrices have 8 bits, `input_proj` excepted."""
    small = copy.deepcopy(drafter).to(torch.bfloat16)
    small.replace_linear(Int8Linear)
    return small
