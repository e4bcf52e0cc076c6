"""The drafter's matrices for a few beams or requests: packed, as the target's are, for products that read them once.

A search reads all of them at every depth, and the libraries behind `linear` take a row more to be work (on an AMD EPYC
with AVX2, the products of four rows take twice the time of one).
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.kernels import few_rows

_MOST_ROWS = 16
"""With more of them it is computing that takes the time, and libraries do it as fast."""


class PackedLinear(nn.Module):
    """A linear layer in fp32 with a second copy of its weight, for few rows.

    Raises:
        NotCompiledError: there is no C++ compiler, or it fails.
    """

    weight: torch.Tensor  # [outputs, inputs]
    panels: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("panels", few_rows.PackedMatrix(linear.weight).panels)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., inputs] -> [..., outputs]
        """Return the products."""
        products: torch.Tensor = torch.ops.vllm_redrafter.packed_linear(x, self.weight, self.panels)
        return products if self.bias is None else products + self.bias


def packed(drafter: ReDrafter) -> ReDrafter | None:
    """Return a copy that computes so; it shares the weights themselves.

    None where that changes little or nothing: the head, the largest matrix, is lent, or all have 8 bits already.

    Raises:
        NotCompiledError: there is no C++ compiler, or it fails.
    """
    if drafter.config.tie_lm_head:
        return None
    changed = copy.deepcopy(drafter, {id(parameter): parameter for parameter in drafter.parameters()})
    return changed if changed.replace_linear(PackedLinear) else None


def _packed_linear(x: torch.Tensor, weight: torch.Tensor, panels: torch.Tensor) -> torch.Tensor:
    rows = x.flatten(0, -2)
    if len(rows) > _MOST_ROWS:
        return functional.linear(x, weight)
    out = x.new_empty(len(rows), len(weight))
    few_rows.linear(rows, panels, None, out)
    return out.view(*x.shape[:-1], -1)


# an operator, so that torch.compile leaves it whole, whatever the number of rows
_operators = torch.library.Library("vllm_redrafter", "FRAGMENT")  # type: ignore[no-untyped-call]
_operators.define("packed_linear(Tensor x, Tensor weight, Tensor panels) -> Tensor")  # type: ignore[no-untyped-call]
_operators.impl("packed_linear", _packed_linear, "CPU")  # type: ignore[no-untyped-call]


@torch.library.register_fake("vllm_redrafter::packed_linear")
def _shaped(x: torch.Tensor, weight: torch.Tensor, panels: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))
