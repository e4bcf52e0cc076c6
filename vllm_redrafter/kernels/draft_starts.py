"""What drafts start from, gathered for all requests at once: hidden states at the last accepted nodes, and the rest.

Programs divide every request's hidden state among them; the first of a request brings its numbers too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_redrafter.kernels.batch import DraftStarts, RequestStates, StepRows
from vllm_redrafter.kernels.launch import Launch

_BLOCK = 1024


def draft_starts(
    hidden: torch.Tensor,  # [num_rows, hidden_size]: the target's last hidden states
    layer_outputs: torch.Tensor | None,  # [>= num_rows, layers * hidden_size]: what left the fused layers
    rows: StepRows,
    states: RequestStates,
    as_chains: bool,  # whether all requests get chains
    out: DraftStarts,
) -> None:
    """Write what the next drafts start from, at the last node that every walk accepted.

    Raises:
        ValueError: hidden states are not contiguous in their rows, or not of the size that the drafter takes.
    """
    plan(hidden, layer_outputs, rows, states, as_chains, out).run()


def plan(
    hidden: torch.Tensor,
    layer_outputs: torch.Tensor | None,
    rows: StepRows,
    states: RequestStates,
    as_chains: bool,
    out: DraftStarts,
) -> Launch:
    """Return the launch of `draft_starts`."""
    hidden_size, input_size = hidden.shape[1], out.hidden.shape[1]
    # without layers, no column is theirs
    outputs = hidden if layer_outputs is None else layer_outputs
    if hidden.stride(1) != 1 or outputs.stride(1) != 1 or not out.hidden.is_contiguous():
        raise ValueError("hidden states, or what is made of them, are not contiguous: pass contiguous rows")
    if input_size != hidden_size + (0 if layer_outputs is None else layer_outputs.shape[1]):
        raise ValueError(
            f"the drafter takes {input_size} numbers, but hidden states have {hidden_size} and the fused layers "
            f"{None if layer_outputs is None else layer_outputs.shape[1]}: pass those that it was trained on"
        )
    return Launch(
        _start_kernel,
        (len(rows.slots), triton.cdiv(input_size, _BLOCK)),
        {
            "hidden": hidden,
            "layer_outputs": outputs,
            "slots": rows.slots,
            "cu_num_logits": rows.cu_num_logits,
            "logits_indices": rows.logits_indices,
            "row_positions": rows.positions,
            "num_sampled": rows.num_sampled,
            # not read where there are none
            "nodes": rows.slots if rows.nodes is None else rows.nodes,
            **states._asdict(),
            **{f"out_{name}": tensor for name, tensor in out._asdict().items()},
            "as_chains": int(as_chains),
            "hidden_stride": hidden.stride(0),
            "outputs_stride": outputs.stride(0),
            "nodes_stride": 0 if rows.nodes is None else rows.nodes.stride(0),
            "hidden_size": hidden_size,
            "input_size": input_size,
            "HAS_NODES": rows.nodes is not None,
            "BLOCK": _BLOCK,
        },
    )


@triton.jit(do_not_specialize=["as_chains"])
def _start_kernel(
    hidden,
    layer_outputs,
    slots,
    cu_num_logits,
    logits_indices,
    row_positions,
    num_sampled,
    nodes,
    last_sampled,
    temperatures,
    seeds,
    is_linear,
    is_foreseen,
    out_hidden,
    out_init_ids,
    out_is_linear,
    out_positions,
    out_temperatures,
    out_seeds,
    as_chains,
    hidden_stride,
    outputs_stride,
    nodes_stride,
    hidden_size,
    input_size,
    HAS_NODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = tl.load(logits_indices + tl.load(cu_num_logits + request)).to(tl.int64)
    if HAS_NODES:
        last = tl.maximum(tl.load(num_sampled + request) - 1, 0)
        row += tl.load(nodes + request * nodes_stride + last)

    column = block * BLOCK + tl.arange(0, BLOCK)
    is_last_state = column < hidden_size
    state = tl.load(hidden + row * hidden_stride + column, mask=is_last_state, other=0.0)
    is_output = (column >= hidden_size) & (column < input_size)
    output = tl.load(layer_outputs + row * outputs_stride + column - hidden_size, mask=is_output, other=0.0)
    seen = tl.where(is_last_state, state, output)
    tl.store(out_hidden + request * input_size + column, seen, mask=column < input_size)

    if block == 0:
        slot = tl.load(slots + request).to(tl.int64)
        tl.store(out_init_ids + request, tl.load(last_sampled + slot))
        tl.store(out_is_linear + request, (tl.load(is_linear + slot) + as_chains) != 0)
        tl.store(out_positions + request, tl.load(row_positions + row) + 1)
        is_known = tl.load(is_foreseen + slot) != 0
        tl.store(out_temperatures + request, tl.where(is_known, tl.load(temperatures + slot), 0.0))
        tl.store(out_seeds + request, tl.load(seeds + slot))
