from __future__ import annotations

import pytest
import torch

from vllm_redrafter.bench.measurement import TOLERANCES
from vllm_redrafter.kernels import reference

elementwise = pytest.importorskip("vllm_redrafter.kernels.elementwise", reason="needs Triton", exc_type=ImportError)


@pytest.mark.parametrize("name", ["silu_of_sum", "plus_silu"])
@pytest.mark.parametrize("shape", [(1,), (2, 3, 64), (5, 1, 1024), (1, 4, 1025), (0, 4, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_compute_what_their_twins_compute(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (6 * torch.randn(shape, generator=generator) for _ in range(2))

    ours = getattr(elementwise, name)(x.to(dtype), y.to(dtype))

    exact = getattr(reference, name)(x.to(dtype).float(), y.to(dtype).float())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), exact, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_large_numbers_do_not_overflow() -> None:
    x = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30])

    assert elementwise.silu_of_sum(x, torch.zeros(5)).tolist() == pytest.approx([0, 0, 0, 200, 1e30])
    assert elementwise.plus_silu(torch.ones(5), x).tolist() == pytest.approx([1, 1, 1, 201, 1e30])


def test_tensors_that_do_not_lie_alike_are_refused() -> None:
    for x, y in ((torch.zeros(2, 3), torch.zeros(3)), (torch.zeros(3, 2).T, torch.zeros(2, 3))):
        with pytest.raises(ValueError, match="pass two of one shape"):
            elementwise.silu_of_sum(x, y)
