"""Unseeded samples follow the target's exact distribution, with trees as without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.engine.conftest import TinyPair
from tests.engine.engine_process import EnginePool, Request, Result, Workload

pytestmark = pytest.mark.engine

NUM_SAMPLES = 100_000
NUM_TOKENS = 3
BATCH = 250
MIN_EXPECTED = 5
SPECULATION = {"budget": "fixed", "num_speculative_tokens": 6}
OPTIONS = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 64}

Prefix = tuple[int, ...]


def samples_workload(prompt: Sequence[int], num_samples: int = NUM_SAMPLES) -> Workload:
    sampling = {"temperature": 1.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "detokenize": False, "n": BATCH}
    return Workload([Request(prompt, sampling)] * (num_samples // BATCH))


def count_texts(result: Result) -> Counter[Prefix]:
    return Counter(tuple(tokens) for answer in result.token_ids() if answer is not None for tokens in answer)


@cache
def load(target: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64)


@torch.inference_mode()
def next_probabilities(target: str, prompt: Sequence[int], prefixes: Sequence[Prefix]) -> torch.Tensor:
    """Return the target's exact probabilities of the token after each prefix, [prefixes, vocab_size]."""
    texts = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
    return load(target)(texts).logits[:, -1].softmax(-1)


def chi_square(target: str, prompt: Sequence[int], counts: Counter[Prefix]) -> tuple[float, int]:
    """Return the p-value of texts of `NUM_TOKENS` tokens, and the number of cells.

    Prefixes that are expected less than `MIN_EXPECTED` times are one cell with their siblings of that kind.
    """
    num_samples = sum(counts.values())
    observed: Counter[Prefix] = Counter()
    for text, count in counts.items():
        for length in range(NUM_TOKENS + 1):
            observed[text[:length]] += count
    cells: list[tuple[float, int]] = []  # expected, observed
    likely: dict[Prefix, float] = {(): float(num_samples)}
    for _ in range(NUM_TOKENS):
        longer: dict[Prefix, float] = {}
        probabilities = next_probabilities(target, prompt, list(likely))
        for (prefix, expected), row in zip(likely.items(), probabilities.tolist(), strict=True):
            mine = {(*prefix, token): expected * chance for token, chance in enumerate(row)}
            kept = {text: value for text, value in mine.items() if value >= MIN_EXPECTED}
            cells.append((expected - sum(kept.values()), observed[prefix] - sum(observed[text] for text in kept)))
            longer |= kept
        likely = longer
    cells += [(expected, observed[text]) for text, expected in likely.items()]
    rare = [cell for cell in cells if cell[0] < MIN_EXPECTED]
    common = [cell for cell in cells if cell[0] >= MIN_EXPECTED]
    common.append((sum(expected for expected, _ in rare), sum(count for _, count in rare)))
    expected, found = zip(*common, strict=True)
    return float(stats.chisquare(found, expected).pvalue), len(common)


def test_a_hundred_thousand_samples_with_trees_follow_the_exact_distribution(
    engines: EnginePool, tiny_pair: TinyPair
) -> None:
    prompt = tiny_pair.prompts[1]

    result = engines.run(tiny_pair.drafted(SPECULATION, **OPTIONS), samples_workload(prompt))

    counts = count_texts(result)
    assert sum(counts.values()) == NUM_SAMPLES
    p_value, num_cells = chi_square(tiny_pair.target, prompt, counts)
    assert num_cells > 300
    assert p_value > 1e-4
    assert result.stats["num_branch_acceptances"] > 0.05 * NUM_SAMPLES
    assert result.stats["accepted_by_depth"][1] > 0.05 * NUM_SAMPLES


def test_as_many_samples_of_plain_vllm_do_too(engines: EnginePool, tiny_pair: TinyPair) -> None:
    prompt = tiny_pair.prompts[1]

    counts = count_texts(engines.run(tiny_pair.plain(**OPTIONS), samples_workload(prompt)))

    assert sum(counts.values()) == NUM_SAMPLES
    assert chi_square(tiny_pair.target, prompt, counts)[0] > 1e-4


def test_a_sampler_that_favours_drafts_shows_in_the_distribution(engines: EnginePool, tiny_pair: TinyPair) -> None:
    prompt = tiny_pair.prompts[1]
    workload = replace(samples_workload(prompt, NUM_SAMPLES // 5), mutation="give_drafts_a_second_chance")

    counts = count_texts(engines.run(tiny_pair.drafted(SPECULATION, **OPTIONS), workload))

    assert chi_square(tiny_pair.target, prompt, counts)[0] < 1e-9
