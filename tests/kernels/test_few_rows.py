"""Products of few rows with packed matrices are those of torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from vllm_redrafter.kernels.few_rows import PackedMatrix


def product(x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return what is written, between guards that nothing may be written to."""
    rows, outputs = len(x), matrix.num_outputs
    memory = torch.full((rows * outputs + 128,), math.nan)
    out = memory[64:-64].view(rows, outputs)
    matrix.linear(x, bias, out)
    assert memory[:64].isnan().all()
    assert memory[-64:].isnan().all()
    return out


@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 10, 11, 12, 13, 17, 25, 64, 97])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(32, 64), (33, 7), (1, 1), (95, 130), (160, 1)])
def test_products_are_those_of_torch(num_rows: int, num_outputs: int, num_inputs: int) -> None:
    torch.manual_seed(num_rows)
    weight, bias = torch.randn(num_outputs, num_inputs), torch.randn(num_outputs)
    x = torch.randn(num_rows, num_inputs)
    matrix = PackedMatrix(weight)

    torch.testing.assert_close(product(x, matrix), functional.linear(x, weight))
    torch.testing.assert_close(product(x, matrix, bias), functional.linear(x, weight, bias))


def test_a_rows_products_do_not_depend_on_the_other_rows() -> None:
    torch.manual_seed(0)
    matrix = PackedMatrix(torch.randn(75, 200))
    x = torch.randn(31, 200)

    together = product(x, matrix)

    for first, end in ((0, 1), (3, 9), (7, 20), (30, 31)):
        assert torch.equal(product(x[first:end], matrix), together[first:end])


def test_the_weight_and_the_input_may_have_any_strides() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(40, 48).t(), torch.randn(40, 6).t()

    torch.testing.assert_close(product(x, PackedMatrix(weight)), functional.linear(x, weight))


def test_the_weight_is_copied() -> None:
    weight = torch.ones(16, 8)
    matrix = PackedMatrix(weight)
    weight.zero_()

    assert torch.equal(product(torch.ones(2, 8), matrix), torch.full((2, 16), 8.0))


def test_a_copy_takes_what_the_weight_takes_and_some_padding() -> None:
    assert 160 * 64 * 4 <= PackedMatrix(torch.ones(160, 64)).num_bytes <= (160 + 31) * 64 * 4
