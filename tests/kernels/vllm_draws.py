"""Writes the tokens that vLLM's model runner V2 draws; a process of its own, for what it does to Triton."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import torch


def main() -> None:
    """Reads rows from one file and writes their tokens to another."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    # vLLM looks for a backend before it makes kernels of its functions; which one the interpreter does not ask
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    logits, positions, requests, temperatures, seeds = torch.load(sys.argv[1])
    tokens = gumbel_sample(logits, requests, temperatures, seeds, positions, apply_temperature=False, is_drafting=False)
    torch.save(tokens, sys.argv[2])


if __name__ == "__main__":
    main()
