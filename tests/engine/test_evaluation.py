"""What `evaluate` foretells is what the served engine then counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine.engine_process import ROOT, Engine, EnginePool, Request, Workload
from vllm_redrafter.core.beam_search import BeamShape
from vllm_redrafter.core.checkpoint import load_drafter
from vllm_redrafter.training.evaluation import acceptance, hold_out
from vllm_redrafter.training.run import load_target
from vllm_redrafter.training.transcripts import Transcript, transcribe

pytestmark = pytest.mark.engine

MODELS = ROOT / "examples" / "models"
SHAPE, NUM_NODES, NUM_TOKENS = BeamShape(4, 4), 8, 48
PROMPTS = (
    "The return value of this function",
    "def read_lines(path):",
    "A mapping object",
    "Note that the",
    "import os\n",
)


def engine(directory: Path) -> Engine:
    speculation = {
        "budget": "fixed",
        "beam_width": SHAPE.width,
        "draft_length": SHAPE.length,
        "num_speculative_tokens": NUM_NODES,
    }
    return Engine(str(directory / "target"), str(directory / "drafter"), speculation)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_simulated_acceptance_is_the_engines(engines: EnginePool, temperature: float) -> None:
    target, _ = load_target(str(MODELS / "target"))
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "target")
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    sampling = {"temperature": temperature, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    requests = [Request(prompt, {**sampling, "seed": seed}) for seed, prompt in enumerate(prompts)]

    served = engines.run(engine(MODELS), Workload(requests))

    told = served.stats["num_emitted_tokens"] / served.stats["num_steps"]
    texts = [
        Transcript(torch.tensor([*prompt, *(samples or [[]])[0]]), len(prompt), "served")
        for prompt, samples in zip(prompts, served.token_ids(), strict=True)
    ]
    if temperature == 0:
        target.stop_token_ids = []
        own = transcribe(target, texts, NUM_TOKENS)
        assert [each.token_ids.tolist() for each in own] == [each.token_ids.tolist() for each in texts]
    (row,) = acceptance(load_drafter(MODELS / "drafter"), hold_out(target, texts), SHAPE, [NUM_NODES], temperature)
    # the end of a text cuts its last step off in the engine only
    assert row.mean_acceptance_length == pytest.approx(told, rel=0.03)
    assert told > 1.3
