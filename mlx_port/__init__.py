"""ReDrafter's tree speculation in MLX, over the models of stock mlx-lm, for Apple silicon.

Reads the same drafter checkpoints as ``vllm_redrafter`` and imports nothing of it, nor torch: what the two share is the
file format and the tests that compare them. This version holds the package's name and no code yet.
"""

from __future__ import annotations
