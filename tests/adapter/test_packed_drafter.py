"""A drafter whose matrices are packed drafts what it did."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from vllm_redrafter.adapter.int8 import quantized
from vllm_redrafter.adapter.packed_drafter import PackedLinear, packed
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.kernels import few_rows


def make_drafter(**config: object) -> ReDrafter:
    torch.manual_seed(0)
    return ReDrafter(ReDrafterConfig(32, 64, num_draft_layers=2, **config)).requires_grad_(False).eval()


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3), (16,), (17,), (5, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_linear_layer(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(40, 56, bias=bias).requires_grad_(False)
    x = torch.randn(*shape, 40)

    found = PackedLinear(linear)(x)

    assert found.shape == (*shape, 56)
    torch.testing.assert_close(found, linear(x))


def test_few_rows_read_the_packed_copy_and_more_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    multiply = few_rows.linear
    monkeypatch.setattr(few_rows, "linear", lambda x, *rest: (rows.append(len(x)), multiply(x, *rest))[1])
    layer = PackedLinear(nn.Linear(40, 56).requires_grad_(False))

    for shape in ((1, 40), (4, 4, 40), (17, 40)):
        layer(torch.ones(shape))

    assert rows == [1, 16]


def test_compiled_code_serves_any_number_of_rows() -> None:
    torch._dynamo.reset()
    layer = PackedLinear(nn.Linear(40, 56).requires_grad_(False))
    compiled = torch.compile(lambda x: functional.silu(layer(x)), fullgraph=True, dynamic=True)

    for rows in (4, 16, 17, 3):
        x = torch.randn(rows, 40)
        torch.testing.assert_close(compiled(x), functional.silu(layer(x)))


def test_the_drafter_itself_is_left_alone_and_the_copy_drafts_the_same_with_the_same_weights() -> None:
    drafter = make_drafter(exit_dim=48)
    hidden, embedding = torch.randn(3, 32), torch.randn(3, 32)

    changed = packed(drafter)

    assert changed is not None
    expected = drafter.logits(drafter.advance(drafter.start(hidden), embedding))
    found = changed.logits(changed.advance(changed.start(hidden), embedding))
    assert not any(isinstance(module, PackedLinear) for module in drafter.modules())
    assert sum(isinstance(module, PackedLinear) for module in changed.modules()) == 5
    assert changed.rnn_u.weight.data_ptr() == drafter.rnn_u.weight.data_ptr()
    torch.testing.assert_close(found, expected)


def test_where_little_or_nothing_would_change_there_is_no_copy() -> None:
    assert packed(make_drafter(tie_lm_head=True, exit_dim=32)) is None
    assert packed(quantized(make_drafter())) is None
