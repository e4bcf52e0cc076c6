from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_redrafter.adapter.v2 import lora


class Wrapper(PunicaWrapperCPU):
    """vLLM's own, as it stands when the adapters of a step are named: one per request."""

    def __init__(self, *adapters: int) -> None:
        super().__init__(max_num_batched_tokens=16, max_batches=8, device="cpu")
        self._sampler_indices[: len(adapters)] = torch.tensor(adapters)
        self.indices_len[1] = len(adapters)


def batch(*num_rows: int) -> Any:
    return SimpleNamespace(cu_num_logits_np=np.array([0, *num_rows], dtype=np.int32).cumsum())


def test_every_row_of_logits_gets_the_adapter_of_its_request() -> None:
    wrapper = Wrapper(2, -1, 0)

    lora.spread(wrapper, batch(3, 1, 2))

    assert wrapper.sampler_indices.tolist() == [2, 2, 2, -1, 0, 0]


def test_what_the_kernels_of_gpus_read_is_made_again() -> None:
    wrapper, prepared = Wrapper(1, 0), []
    wrapper.prompt_mapping_meta = SimpleNamespace(prepare_tensors=lambda rows: prepared.append(rows.tolist()))

    lora.spread(wrapper, batch(1, 1))
    lora.spread(wrapper, batch(1, 2))

    # where each request has one row, vLLM's own is right
    assert prepared == [[1, 0, 0]]


def test_the_wrapper_is_found_where_there_are_adapters() -> None:
    layer = nn.Linear(2, 2)
    assert lora.find_wrapper(nn.Sequential(layer)) is None

    layer.punica_wrapper = wrapper = Wrapper(0)

    assert lora.find_wrapper(nn.Sequential(layer)) is wrapper
