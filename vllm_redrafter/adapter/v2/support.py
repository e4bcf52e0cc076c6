"""When vLLM's model runner V2 serves, and what speculation cannot be combined with there."""

from __future__ import annotations

import os
from typing import Any

from packaging.version import Version

METHOD = "ngram_gpu"
"""How our method is spelled under V2: of vLLM's closed list, the one that drafts on the device without a KV cache of
its own, so that async scheduling stays on and no slots are reserved. Which speculator is built is our patch's doing."""

EXTENSION_PATH = "vllm_redrafter.adapter.v2.worker.ReDrafterWorkerExtension"

VLLM_RANGE = (Version("0.32.0"), Version("0.34"))
"""At least the first, below the second: the tests run 0.32, the newest for CPUs, and the Python files of 0.33."""

UNSUPPORTED: tuple[tuple[str, str], ...] = (
    ("model runner V2 without Triton", "its kernels and ours are written in Triton"),
    ("GPUs below sm_80", "the kernels are compiled for sm_80 and newer"),
    ("FULL CUDA graphs of mixed batches", "a graph holds either trees or prefill, so choose FULL_AND_PIECEWISE"),
    ("prefill context parallelism", "the rows of a tree are spread over ranks"),
    ("dual batch overlap", "vLLM falls back to model runner V1 for it, which our method is unknown to"),
    ("batch-sharded sampling", "every rank must know all accepted paths"),
    ("sampling masks", "they are recorded for chains of tokens only"),
    ("trace replay", "vLLM puts the trace in the place of tokens drawn only where nothing is drafted"),
)


def uses_v2() -> bool:
    """Return whether the engine about to be made runs model runner V2: asked for, or the default of a GPU."""
    from vllm.platforms import current_platform

    asked = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    return asked == "1" if asked is not None else not current_platform.is_cpu()


def found_unsupported(engine_args: Any, target: Any, parallel: Any) -> dict[str, bool]:
    """Return for every feature of `UNSUPPORTED` whether it was asked for."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    graphs = getattr(engine_args.compilation_config, "cudagraph_mode", None)
    return {
        "model runner V2 without Triton": not HAS_TRITON,
        "GPUs below sm_80": current_platform.is_cuda() and not current_platform.has_device_capability(80),
        "FULL CUDA graphs of mixed batches": graphs == CUDAGraphMode.FULL and not target.enforce_eager,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "dual batch overlap": parallel.use_ubatching,
        "batch-sharded sampling": bool(parallel.enable_batch_sharded_sampling),
        "sampling masks": bool(getattr(target, "return_sampling_mask", False)),
        "trace replay": bool(getattr(target, "enable_trace_replay", False)),
    }
