"""A drafter from the Hugging Face Hub: `python examples/load_from_hub.py TARGET DRAFTER [--revision R]`.

TARGET and DRAFTER are Hub ids or directories. The drafter is fetched into the Hub's cache first (HF_TOKEN, HF_HOME,
HF_ENDPOINT and HF_HUB_OFFLINE are honoured, pickles are not loaded), described, and then used by vLLM.
"""

from __future__ import annotations

import argparse
import os

from vllm_redrafter.core.checkpoint import load_drafter


def main() -> None:
    """Loads the drafter, says what it is, and generates with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter")
    parser.add_argument("--revision", help="branch, tag or commit of the drafter")
    parser.add_argument("--prompt", default="A list is")
    arguments = parser.parse_args()

    drafter = load_drafter(arguments.drafter, arguments.revision)
    config = drafter.config
    millions = sum(parameter.numel() for parameter in drafter.parameters()) / 1e6
    print(f"{arguments.drafter}: {millions:.1f}M parameters, made for {config.verifier}")
    print(f"drafts {config.beam_width} beams of {config.draft_length} tokens over {config.head_size} tokens")

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    speculation = {"method": "redrafter", "model": arguments.drafter, "num_speculative_tokens": 8}
    if arguments.revision is not None:
        speculation["revision"] = arguments.revision
    llm = LLM(arguments.target, dtype="float32", speculative_config=speculation)
    output = llm.generate([arguments.prompt], SamplingParams(temperature=0.0, max_tokens=64))[0]
    print(output.prompt + output.outputs[0].text)


# vLLM starts processes that import this file
if __name__ == "__main__":
    main()
