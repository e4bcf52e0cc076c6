"""A drafter in 8 bits drafts nearly what it was."""

from __future__ import annotations

import torch
from torch import nn

from vllm_redrafter.adapter.int8 import Int8Linear, quantized
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter


def test_products_differ_by_the_rounding_of_the_weights_alone() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    x = torch.randint(-4, 5, (2, 3, 64)).float()
    small = Int8Linear(linear)

    rounded = torch.einsum("...i,oi->...o", x, small.weight.float() * small.scales[:, None]) + linear.bias
    assert small(x).shape == (2, 3, 48)
    torch.testing.assert_close(small(x), rounded)
    # half a step per weight, the largest of a row being 127 steps
    bound = x.abs().sum(dim=-1, keepdim=True) * linear.weight.abs().amax(dim=1) / 127 / 2
    assert bool(((small(x) - linear(x)).abs() <= bound + 1e-5).all())


def test_a_row_of_zeros_stays_zero() -> None:
    linear = nn.Linear(32, 32, bias=False)
    linear.weight.data.zero_()

    assert torch.equal(Int8Linear(linear)(torch.ones(1, 32)), torch.zeros(1, 32))


def test_the_drafter_itself_is_left_alone_and_the_copy_holds_bytes() -> None:
    torch.manual_seed(0)
    drafter = ReDrafter(ReDrafterConfig(32, 64, exit_dim=48, num_draft_layers=2)).requires_grad_(False).eval()
    hidden, embedding = torch.randn(5, 32), torch.randn(5, 32)
    small = quantized(drafter)

    expected = drafter.logits(drafter.advance(drafter.start(hidden), embedding))
    found = small.logits(small.advance(small.start(hidden.bfloat16()), embedding.bfloat16()))
    assert drafter.rnn_u.weight.dtype == torch.float32
    matrices = [module.weight.dtype for module in small.modules() if isinstance(module, Int8Linear)]
    assert matrices == [torch.int8] * 5
    assert bool((found.float().argmax(dim=-1) == expected.argmax(dim=-1)).all())
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03 * float(expected.abs().max()))
