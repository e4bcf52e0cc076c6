"""The drafter's beam search on a CPU, in one call for all depths of all requests (`cpu_beam_search.cpp`).

Its twin is `core.beam_search`: some twenty operations per depth, most of which take longer to call than to compute.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from vllm_redrafter.core.beam_search import BeamShape, Candidates
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.core.noise import Truncation
from vllm_redrafter.kernels import cpu_library


class Draws(NamedTuple):
    """What is known of how the requests of a batch will be sampled."""

    seeds: torch.Tensor  # [batch, depths] int64: of their noise
    truncation: Truncation
    """For every request; a temperature of 0 stands for greedy ones."""


class PackedDrafter:
    """A drafter's matrices as the kernel reads them: copies, rounded to bf16.

    Args:
        table: [tokens, hidden_size] fp32 or bf16: the target's embeddings, or what `ReDrafter.fold_embeddings` made of
            them; it is not copied.

    Raises:
        ValueError: the drafter's `top_k` leaves tokens out, or the table is of another type.
        NotCompiledError: there is no C++ compiler, or it fails.
    """

    def __init__(self, drafter: ReDrafter, table: torch.Tensor) -> None:
        config = drafter.config
        if config.top_k is not None:
            raise ValueError(f"top_k of the drafter is {config.top_k}: the kernel searches among all tokens")
        if table.dtype not in (torch.float32, torch.bfloat16) or not table.is_contiguous():
            raise ValueError(f"embeddings are {table.dtype} of strides {table.stride()}: pass fp32 or bf16, contiguous")
        self.drafter = drafter
        self.table = table
        self.target_ids = drafter.drafted_ids(torch.device("cpu"))
        hidden = config.hidden_size
        embedding = drafter.rnn_w.weight if config.rnn and isinstance(drafter.rnn_w, nn.Linear) else None
        self.embedding = _Packed(embedding)
        self.recurrence = _Packed(drafter.rnn_u.weight, drafter.rnn_u.bias) if config.rnn else _Packed(None)
        self.opening = self.projection = _Packed(None)
        if config.has_input_proj:
            weight = drafter.input_proj.weight
            self.opening = _Packed(weight[:, :hidden], drafter.input_proj.bias)
            self.projection = _Packed(weight[:, hidden:])
        self.blocks = [_Packed(block.linear.weight, block.linear.bias) for block in drafter.residual_blocks()]
        self.head = _Packed(drafter.head_weight())


class CpuBeamSearch:
    """A search of one shape.

    Args:
        num_candidates: kept per depth, at least `shape.width`.
        sharpness: what logits are multiplied by.

    Raises:
        ValueError: the shape holds a number below 1.
    """

    def __init__(self, packed: PackedDrafter, shape: BeamShape, num_candidates: int, sharpness: float) -> None:
        shape.check()
        self._packed = packed
        self._length = shape.length
        self._num_kept = max(shape.width, num_candidates)
        self._blocks = (_Matrix * len(packed.blocks))(*(block.matrix for block in packed.blocks))
        self._call = call = _Call()
        for name in ("opening", "embedding", "recurrence", "projection", "head"):
            setattr(call, name, ctypes.pointer(getattr(packed, name).matrix))
        call.blocks = ctypes.cast(self._blocks, ctypes.POINTER(_Matrix))
        if packed.table.dtype == torch.float32:
            call.table = packed.table.data_ptr()
        else:
            call.half_table = packed.table.data_ptr()
        call.target_ids = packed.target_ids.data_ptr()
        call.num_blocks, call.hidden_size = len(packed.blocks), packed.drafter.config.hidden_size
        call.width, call.num_kept, call.length = shape.width, self._num_kept, shape.length
        call.sharpness = sharpness
        self._run = _library().beam_search

    def run(
        self,
        hidden: torch.Tensor,  # [batch, input_size]
        init_ids: torch.Tensor,  # [batch]
        floor: float = float("-inf"),
        draws: Draws | None = None,
    ) -> Candidates:
        """Return the candidates of all depths, or of those up to the one at which no beam is above the floor.

        Args:
            floor: cumulative log-probability.
            draws: None where nothing is sampled, or nothing is known of it.
        """
        drafter, call = self._packed.drafter, self._call
        hidden = drafter.fuse(hidden.to(drafter.dtype)).float().contiguous()
        init_ids = init_ids.contiguous()
        shape = len(init_ids), self._length * self._num_kept
        token_ids, parents = torch.empty(2, *shape, dtype=torch.int64)
        log_probs = torch.empty(shape)
        call.hidden, call.init_ids = hidden.data_ptr(), init_ids.data_ptr()
        call.token_ids, call.parents = token_ids.data_ptr(), parents.data_ptr()
        call.log_probs = log_probs.data_ptr()
        call.num_requests, call.floor = len(init_ids), floor
        call.seeds = None
        if draws is not None:
            columns = [column.contiguous() for column in (draws.seeds, *draws.truncation[:4])]
            addresses = (column.data_ptr() for column in columns)
            call.seeds, call.temperatures, call.top_k, call.top_p, call.min_p = addresses
        num_found = self._run(call)
        return Candidates(*(column[:, :num_found] for column in (token_ids, parents, log_probs)))


class _Packed:
    """A matrix in panels, with its bias padded alike; without a weight, none."""

    def __init__(self, weight: torch.Tensor | None, bias: torch.Tensor | None = None) -> None:
        self.matrix = _Matrix()
        if weight is None:
            return
        self.matrix.outputs, self.matrix.inputs = weight.shape
        width = int(_library().panel_width())
        padding = -len(weight) % width
        panels = functional.pad(weight.detach().to(torch.bfloat16), (0, 0, 0, padding))
        self._panels = panels.view(-1, width, weight.shape[1]).transpose(1, 2).contiguous()
        self.matrix.panels = self._panels.data_ptr()
        if bias is not None:
            self._bias = functional.pad(bias.detach().float(), (0, padding))
            self.matrix.bias = self._bias.data_ptr()


class _Matrix(ctypes.Structure):
    """`Matrix` in C++."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    )


class _Call(ctypes.Structure):
    """`Call` in C++."""

    _fields_ = (
        *((name, ctypes.POINTER(_Matrix)) for name in ("opening", "embedding", "recurrence", "projection")),
        *((name, ctypes.POINTER(_Matrix)) for name in ("blocks", "head")),
        *((name, ctypes.c_void_p) for name in ("table", "half_table", "target_ids", "hidden", "init_ids", "seeds")),
        *((name, ctypes.c_void_p) for name in ("temperatures", "top_p", "min_p", "top_k")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "parents", "log_probs")),
        *((name, ctypes.c_int64) for name in ("num_requests", "num_blocks", "hidden_size")),
        *((name, ctypes.c_int64) for name in ("width", "num_kept", "length")),
        *((name, ctypes.c_float) for name in ("sharpness", "floor")),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu_library.load("cpu_beam_search")
    library.beam_search.argtypes = [ctypes.POINTER(_Call)]
    library.beam_search.restype = ctypes.c_int64
    return library
