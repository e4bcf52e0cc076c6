"""A drafter for a target, in Python: `python examples/train_a_drafter.py [TARGET DATA OUTPUT]`.

By default a few steps for the example target, on text that it writes itself: enough to see every part at work, too few
for a good drafter. `vllm-redrafter train` does the same from the command line, with all its options.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from vllm_redrafter.core.beam_search import BeamShape
from vllm_redrafter.core.checkpoint import load_drafter
from vllm_redrafter.training.corpus import load_corpus
from vllm_redrafter.training.evaluation import acceptance, hold_out
from vllm_redrafter.training.quick import write_documents
from vllm_redrafter.training.recipe import QUICK, choose
from vllm_redrafter.training.run import load_target, openings, train
from vllm_redrafter.training.transcripts import transcribe

TARGET = Path(__file__).parent / "models" / "target"


def main() -> None:
    """Trains, then lets the target answer a few prompts and tells what verifying trees of 8 nodes would yield."""
    name, data, output = sys.argv[1:] or (str(TARGET), "", tempfile.mkdtemp())
    target, tokenizer = load_target(name)
    recipe = choose(QUICK, {"max_steps": 20, "batch_size": 2, "num_evaluations": 1}, target)
    if data:
        documents = load_corpus([data], tokenizer, max_length=recipe.max_length).documents
    else:
        documents = write_documents(target, tokenizer, seconds=5)

    trained = train(target, tokenizer, documents, Path(output), recipe, verifier=name)

    prompts = openings(documents[-4:], recipe.max_length)
    held_out = hold_out(target, transcribe(target, prompts, max_new_tokens=64))
    (row,) = acceptance(load_drafter(trained.directory), held_out, BeamShape(4, 5), [8], temperature=0.0)
    print(f"{trained.directory}: {trained.num_steps} steps, {row.mean_acceptance_length:.2f} tokens per verification")


if __name__ == "__main__":
    main()
