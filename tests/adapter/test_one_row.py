"""A drafter for one row drafts what it did, up to the rounding of its weights to 16 bits."""

from __future__ import annotations

import torch
from torch import nn

from vllm_redrafter.adapter.one_row import OneRowLinear, for_one_row
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter


def make_drafter(**config: object) -> ReDrafter:
    torch.manual_seed(0)
    return ReDrafter(ReDrafterConfig(32, 64, num_draft_layers=2, **config)).requires_grad_(False).eval()


def test_products_are_those_of_the_rounded_weights() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    x = torch.randn(1, 1, 64)

    found = OneRowLinear(linear)(x)

    assert found.shape == (1, 1, 48)
    torch.testing.assert_close(found, x @ linear.weight.bfloat16().float().T + linear.bias)
    assert OneRowLinear(nn.Linear(64, 48, dtype=torch.bfloat16))(x.bfloat16()).dtype == torch.bfloat16


def test_the_drafter_itself_is_left_alone_and_the_copy_drafts_nearly_the_same() -> None:
    drafter = make_drafter(exit_dim=48)
    hidden, embedding = torch.randn(1, 32), torch.randn(1, 32)

    changed = for_one_row(drafter)

    assert changed is not None
    expected = drafter.logits(drafter.advance(drafter.start(hidden), embedding))
    found = changed.logits(changed.advance(changed.start(hidden), embedding))
    assert not any(isinstance(module, OneRowLinear) for module in drafter.modules())
    assert sum(isinstance(module, OneRowLinear) for module in changed.modules()) == 5
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


def test_a_head_that_the_target_has_lent_is_not_copied() -> None:
    assert for_one_row(make_drafter(tie_lm_head=True, exit_dim=32)) is None
