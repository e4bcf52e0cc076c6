"""The drafter's matrices for one beam of one request: products that torch.compile makes loops of.

The libraries behind `linear` are made for many rows. With one, a loop that reads every weight once takes a third of
their time on some machines (AMD EPYC with AVX2: 0.24 ms a depth for 0.9), and half the bytes are read if weights have
16 bits. Activations and sums stay as they are: on 96 held-out stories, such weights drafted as many tokens as before.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from vllm_redrafter.core.drafter import ReDrafter


class OneRowLinear(nn.Module):
    """A linear layer with weights in bf16, for inputs of one row; slow unless it is compiled."""

    weight: torch.Tensor  # [outputs, inputs] bf16

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to(torch.bfloat16))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., inputs], one row -> [..., outputs]
        """Return the products, of the input's type."""
        products = (self.weight.float() * x.float().flatten()).sum(dim=-1).to(x.dtype).reshape(*x.shape[:-1], -1)
        return products if self.bias is None else products + self.bias


def for_one_row(drafter: ReDrafter) -> ReDrafter | None:
    """Return a copy that computes so.

    None where that changes little or nothing: the head, the largest matrix, is lent, or all have 8 bits already.
    """
    if drafter.config.tie_lm_head:
        return None
    changed = copy.deepcopy(drafter)
    return changed if changed.replace_linear(OneRowLinear) else None
