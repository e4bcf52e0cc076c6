from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm import SamplingParams

from vllm_redrafter.adapter.v2.foresight import has_keyed_noise
from vllm_redrafter.core.noise import leaves_tokens_out


def test_noise_in_fp64_is_not_known() -> None:
    assert has_keyed_noise(SimpleNamespace(use_fp64_gumbel=False))
    assert not has_keyed_noise(SimpleNamespace(use_fp64_gumbel=True))


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, True), ({"seed": 1}, True), ({"top_p": 0.9}, False), ({"top_k": 5}, False), ({"min_p": 0.1}, False)],
)
def test_requests_that_leave_tokens_out_are_not_foreseen(options: dict[str, float], expected: bool) -> None:
    assert leaves_tokens_out(SamplingParams(temperature=1.0, **options)) != expected
