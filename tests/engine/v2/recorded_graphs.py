"""CUDA graphs on a CPU: what a GPU would capture is recorded, kernel by kernel, and replayed on the same memory.

A replay runs none of the Python that was captured. Every kernel gets the tensors and numbers that it had then, and
writes where it wrote then, so what capture must not bake in, an address, a length, a choice of the host, shows as it
does on a GPU. All memory that captured regions allocated holds garbage when a replay begins, as in a pool that graphs
share, but for what a piece of a forward reads of the pieces before it. A read of the device by the host fails, as no
capture can hold it.

A kernel is what torch's dispatcher has at its bottom, a launch of Triton's, and what a stand-in says is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor
from vllm.compilation import cuda_graph
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker import workspace
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu import cudagraph_utils

from tests.kernels.launches import are_fresh, launches_a_kernel, tensors_of

_GARBAGE = -(1 << 30)


class RecordedGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    num_replays: ClassVar[int] = 0
    """Of all graphs of this process, pieces left out."""
    num_replayed_pieces: ClassVar[int] = 0
    """Of all graphs of this process that hold a part of a forward."""
    pool: ClassVar[list[torch.Tensor]] = []
    """What captured regions allocated."""

    def __init__(self) -> None:
        self.kernels: list[Callable[[], object]] = []
        self.allocated: list[torch.Tensor] = []
        self.is_piece = _is_piecewise()

    @torch.inference_mode()
    def replay(self) -> None:
        if self.is_piece:
            RecordedGraph.num_replayed_pieces += 1
        else:
            RecordedGraph.num_replays += 1
        for tensor in self.allocated if self.is_piece else self.pool:
            if tensor.dtype.is_floating_point:
                tensor.fill_(float("nan"))
            elif tensor.dtype != torch.bool:
                tensor.fill_(max(_GARBAGE, torch.iinfo(tensor.dtype).min))
        for kernel in self.kernels:
            kernel()


class _Recorder(TorchDispatchMode):
    current: ClassVar[_Recorder | None] = None

    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.name()
        if name == "aten::_local_scalar_dense":
            raise AssertionError("the host reads the device while a graph is captured")
        if function.namespace == "vllm":
            # what vLLM hides from torch.compile: Python that launches kernels
            with self:
                return function._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        result = function(*args, **kwargs)
        fresh = are_fresh(result, (args, kwargs))
        written = [tensor for tensor, is_fresh in zip(tensors_of(result), fresh, strict=True) if is_fresh]
        RecordedGraph.pool += written
        self.graph.allocated += written
        if launches_a_kernel(function, result, (args, kwargs)):
            self.graph.kernels.append(partial(_run_again, function, args, kwargs, fresh, written))
        return result


@contextmanager
def capture(graph: RecordedGraph, pool: Any = None, stream: Any = None) -> Iterator[None]:
    """Let a graph hold what is run: stands for `torch.cuda.graph`."""
    _Recorder.current = _Recorder(graph)
    try:
        with _Recorder.current:
            yield
    finally:
        _Recorder.current = None


def kernel(run: Callable[[], object]) -> None:
    """Run what stands for one kernel, and let a graph that is being captured hold it."""
    if _Recorder.current is None:
        run()
        return
    _Recorder.current.graph.kernels.append(run)
    with _disable_current_modes():
        run()


def install() -> None:
    """Let vLLM capture graphs on this CPU, in the region of its start where a GPU's worker does."""
    torch.cuda.CUDAGraph, torch.cuda.graph = RecordedGraph, capture
    torch.accelerator.empty_cache = lambda: None
    torch.accelerator.get_memory_info = lambda *device: (0, 0)
    torch.accelerator.synchronize = lambda *device: None
    cuda_graph.weak_ref_tensors = lambda tensors: tensors
    cudagraph_utils.graph_capture = lambda device: nullcontext()
    cudagraph_utils.capture_pool = lambda pool, config: nullcontext(pool)
    cudagraph_utils.CudaGraphManager._capture_stream = lambda self, desc: None
    CpuPlatform.support_static_graph_mode = classmethod(lambda cls: True)
    CpuPlatform.graph_pool_handle = classmethod(lambda cls: (0, 0))
    CpuPlatform.get_static_graph_wrapper_cls = classmethod(lambda cls: "vllm.compilation.cuda_graph.CUDAGraphWrapper")
    launch, warm_up = GridExecutor.__call__, CPUWorker.compile_or_warm_up_model

    def compile_or_warm_up_model(self: CPUWorker) -> Any:
        times = warm_up(self)
        workspace.init_workspace_manager(self.model_runner.device)
        # of an engine before this one
        RecordedGraph.pool.clear()
        self.model_runner.capture_model()
        return times

    GridExecutor.__call__ = lambda self, *args, **kwargs: kernel(partial(launch, self, *args, **kwargs))
    CPUWorker.compile_or_warm_up_model = compile_or_warm_up_model


def _is_piecewise() -> bool:
    if not is_forward_context_available():
        return False
    return get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE


def _run_again(function: Any, args: Any, kwargs: Any, fresh: list[bool], written: list[torch.Tensor]) -> None:
    results = tensors_of(function(*args, **kwargs))
    for old, new in zip(written, [new for new, is_fresh in zip(results, fresh, strict=True) if is_fresh], strict=True):
        old.copy_(new)
