from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm import SamplingParams

from vllm_redrafter.adapter.v2.foresight import Foresight

SEEDED = SamplingParams(temperature=1.0, seed=1)
TOP_P = SamplingParams(temperature=1.0, top_p=0.9)
TOP_K = SamplingParams(temperature=1.0, top_k=5)
SEEDED_TOP_P = SamplingParams(temperature=1.0, top_p=0.9, seed=1)
PLAIN = SamplingParams(temperature=1.0)


@pytest.mark.parametrize(
    ("sampler", "covered"),
    [
        ({}, [True, True, True, True, True]),
        ({"use_flashinfer": True}, [True, True, False, False, True]),
        ({"use_xpu_sampler": True}, [True, True, False, False, True]),
        ({"use_fp64_gumbel": True}, [False] * 5),
    ],
    ids=["keyed", "FlashInfer", "XPU", "fp64"],
)
def test_what_another_sampler_may_serve_is_not_foreseen(sampler: dict[str, bool], covered: list[bool]) -> None:
    off = {"use_fp64_gumbel": False, "use_flashinfer": False, "use_xpu_sampler": False}

    foresight = Foresight.of(SimpleNamespace(**off | sampler))

    assert [foresight.covers(each) for each in (PLAIN, SEEDED, TOP_P, TOP_K, SEEDED_TOP_P)] == covered
