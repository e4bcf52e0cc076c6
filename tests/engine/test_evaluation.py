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
    told, texts = served(engines, temperature, is_seeded=True)
    if temperature == 0:
        target, _ = load_target(str(MODELS / "target"))
        target.stop_token_ids = []
        own = transcribe(target, texts, NUM_TOKENS)
        assert [each.token_ids.tolist() for each in own] == [each.token_ids.tolist() for each in texts]

    # the end of a text cuts its last step off in the engine only
    assert simulated(texts, temperature) == pytest.approx(told, rel=0.03)
    assert told > 1.3


@pytest.mark.parametrize("is_seeded", [True, False])
def test_sampled_requests_gain_by_foresight_with_seeds_and_without(engines: EnginePool, is_seeded: bool) -> None:
    told, texts = served(engines, 1.0, is_seeded=is_seeded, times=4)

    assert told > 1.1 * simulated([text._replace(seed=None) for text in texts], 1.0)


def served(
    engines: EnginePool, temperature: float, *, is_seeded: bool, times: int = 1
) -> tuple[float, list[Transcript]]:
    """Return how many tokens a step of the engine yields, and what it wrote."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "target")
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS] * times
    seeds = list(range(len(prompts))) if is_seeded else [None] * len(prompts)
    sampling = {"temperature": temperature, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    requests = [Request(prompt, {**sampling, "seed": seed}) for seed, prompt in zip(seeds, prompts, strict=True)]
    run = engines.run(engine(MODELS), Workload(requests))
    texts = [
        Transcript(torch.tensor([*prompt, *(samples or [[]])[0]]), len(prompt), "served", seed)
        for seed, prompt, samples in zip(seeds, prompts, run.token_ids(), strict=True)
    ]
    return run.stats["num_emitted_tokens"] / run.stats["num_steps"], texts


def simulated(texts: list[Transcript], temperature: float) -> float:
    """Return how many tokens a step would yield over texts, whose noise is known where they have seeds."""
    target, _ = load_target(str(MODELS / "target"))
    held_out = hold_out(target, texts)
    (row,) = acceptance(load_drafter(MODELS / "drafter"), held_out, SHAPE, [NUM_NODES], temperature)
    return row.mean_acceptance_length
