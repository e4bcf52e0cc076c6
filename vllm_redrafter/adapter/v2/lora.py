"""LoRA adapters of the target: which row of logits belongs to whose.

vLLM's model runner V2 (0.32 and 0.33) tells the layer that adds an adapter's share to the logits one adapter per
request, as if each had one row of logits. A request that verifies drafts has one row per node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def find_wrapper(target: nn.Module) -> Any:
    """Return what all LoRA layers of a target share, or None where it has none."""
    wrappers = (getattr(module, "punica_wrapper", None) for module in target.modules())
    return next((wrapper for wrapper in wrappers if wrapper is not None), None)


def spread(wrapper: Any, input_batch: Any) -> None:
    """Repeat every request's adapter for each of its rows of logits, once vLLM has named the adapters of a step."""
    of_request = wrapper.sampler_indices  # [num_reqs]
    ends = input_batch.cu_num_logits_np
    num_rows = int(ends[-1])
    if len(of_request) == num_rows:
        return
    counts = torch.from_numpy(ends[1:] - ends[:-1]).to(of_request.device, non_blocking=True)
    of_row = of_request.repeat_interleave(counts, output_size=num_rows)
    wrapper._sampler_indices[:num_rows] = of_row
    wrapper.indices_len[1] = num_rows
    # what the kernels for GPUs read
    if hasattr(wrapper, "prompt_mapping_meta"):
        wrapper.prompt_mapping_meta.prepare_tensors(wrapper.sampler_indices)
