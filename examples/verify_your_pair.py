"""Proof on your own pair, from Python: `python examples/verify_your_pair.py [TARGET DRAFTER]`.

`vllm-redrafter verify` does this with more kinds of sampling and says where the first difference is. Two processes,
because an engine without a drafter should not share one with an engine that has one.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

MODELS = Path(__file__).parent / "models"
PROMPTS = ["The with statement", "A list is", "def read_lines(path):", "Once upon a time"]


def generate(target: str, drafter: str | None) -> list[list[int]]:
    """Returns the tokens of greedy and of seeded answers, with the drafter or without."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    # "fixed": always 8 nodes, so that trees are verified even where drafting less would be faster
    speculation = {"method": "redrafter", "model": drafter, "num_speculative_tokens": 8, "budget": "fixed"}
    llm = LLM(target, dtype="float32", speculative_config=speculation if drafter else None)
    token_ids = []
    for sampling in (SamplingParams(max_tokens=64, temperature=0.0), SamplingParams(max_tokens=64, seed=1)):
        token_ids += [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, sampling)]
    return token_ids


def main() -> int:
    """Returns 0 where all answers are equal, 1 otherwise."""
    target, drafter = sys.argv[1:] or (str(MODELS / "target"), str(MODELS / "drafter"))
    results = []
    for used in (None, drafter):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            results.append(process.submit(generate, target, used).result())
    equal = [left == right for left, right in zip(*results, strict=True)]
    print(f"{sum(equal)} of {len(equal)} answers are identical with and without the drafter")
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
