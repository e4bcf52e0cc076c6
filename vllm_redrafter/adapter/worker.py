"""vLLM's CPU worker with our runner and attention; the plugin names it where the drafter is asked for."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_redrafter.adapter.runner import TreeModelRunner


class ReDrafterCPUWorker(CPUWorker):
    """A CPU worker that verifies token trees."""

    def init_device(self) -> None:
        """Build the runner; the attention backend of this process becomes ours before any layer asks for one."""
        register_backend(AttentionBackendEnum.CPU_ATTN, "vllm_redrafter.adapter.attention.TreeAttentionBackend")
        # CPUWorker builds its runner from this global and offers no hook of its own
        stock = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = TreeModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = stock

    def compile_or_warm_up_model(self) -> Any:
        """Warm up as vLLM does, then measure what forward passes cost."""
        times = super().compile_or_warm_up_model()
        self.model_runner.calibrate()
        return times

    def redrafter_stats(self) -> dict[str, Any]:
        """Return what speculation did since this worker started."""
        return self.model_runner.describe()
