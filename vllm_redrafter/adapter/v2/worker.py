"""What vLLM's workers can be asked under model runner V2: methods mixed into whichever worker class it uses."""

from __future__ import annotations

from typing import Any


class ReDrafterWorkerExtension:
    """Named in `ParallelConfig.worker_extension_cls`."""

    model_runner: Any

    def redrafter_stats(self) -> dict[str, Any]:
        """Return what speculation did since this worker started."""
        counts: dict[str, Any] = self.model_runner.rejection_sampler.counts.describe()
        return counts
