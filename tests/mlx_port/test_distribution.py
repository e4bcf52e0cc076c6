from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from scipy.stats import chisquare

from mlx_port.target import Target
from tests.mlx_port.tiny_models import CONFIGS, alone, drafted, make_drafter, make_model, make_plan

PROMPT = [4]
NUM_TOKENS = 3
NUM_TEXTS = 400
# a correct sampler falls below it once in ten thousand seeds, and the seed is fixed
SIGNIFICANCE = 1e-4

Probabilities = np.ndarray  # [vocab], float64


class Case(NamedTuple):
    """A sampler of mlx-lm, and what it does to a distribution, written down independently."""

    options: dict
    expected: Callable[[Probabilities], Probabilities]
    penalty: float = 1.0
    """What mlx-lm's repetition penalty divides positive logits by."""


def _tempered(probabilities: Probabilities, temp: float) -> Probabilities:
    powered = probabilities ** (1 / temp)
    return powered / powered.sum()


def _top_k(probabilities: Probabilities) -> Probabilities:
    kept = probabilities >= np.sort(probabilities)[-2]
    return _tempered(probabilities * kept, 0.8)


def _top_p(probabilities: Probabilities) -> Probabilities:
    order = np.argsort(-probabilities)
    above = np.cumsum(probabilities[order]) - probabilities[order]
    kept = np.zeros(len(probabilities), bool)
    kept[order[above < 0.6]] = True
    return _tempered(probabilities * kept, 1.0)


def _xtc(probabilities: Probabilities) -> Probabilities:
    probabilities = _top_p(probabilities)
    above = probabilities > 0.15
    least = np.where(above, probabilities, np.inf).min()
    excluded = _tempered(probabilities * (probabilities <= least), 1.0)
    return (probabilities + excluded) / 2


def _penalized(logits: np.ndarray, text: tuple[int, ...], penalty: float) -> np.ndarray:
    seen = sorted({*PROMPT, *text})
    logits[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
    return logits


CASES = {
    "top_k": Case({"temp": 0.8, "top_k": 2}, _top_k),
    "top_p": Case({"temp": 1.0, "top_p": 0.6}, _top_p),
    "top_k, repetition penalty": Case({"temp": 0.8, "top_k": 2}, _top_k, 1.4),
    "xtc": Case({"temp": 1.0, "top_p": 0.6, "xtc_probability": 0.5, "xtc_threshold": 0.15}, _xtc),
}


def _make_target() -> Target:
    """Return a target that is sure enough of itself for a few texts to make up most of the distribution."""
    model = make_model({**CONFIGS["llama, untied"], "num_hidden_layers": 1})
    model.lm_head.weight = 2 * model.lm_head.weight
    return Target(model)


def _exact(target: Target, case: Case) -> dict[tuple[int, ...], float]:
    """Return the probability of every text."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NUM_TOKENS):
        longer = {}
        for text, probability in texts.items():
            logits = np.array(target.model(mx.array([[*PROMPT, *text]]))[0, -1].tolist())
            logits = _penalized(logits, text, case.penalty)
            softmax = np.exp(logits - logits.max())
            for token_id, chance in enumerate(case.expected(softmax / softmax.sum())):
                if chance > 0:
                    longer[(*text, token_id)] = probability * chance
        texts = longer
    return texts


def _p_value(observed: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    assert set(observed) <= set(exact)
    counts, expected = [0.0], [0.0]
    for text, probability in exact.items():
        # what is too rare for the statistic is counted together
        if probability * NUM_TEXTS < 5:
            counts[0] += observed[text]
            expected[0] += probability * NUM_TEXTS
        else:
            counts.append(observed[text])
            expected.append(probability * NUM_TEXTS)
    start = 0 if expected[0] else 1
    assert len(counts) - start > 5
    return float(chisquare(counts[start:], expected[start:]).pvalue)


@pytest.mark.parametrize("name", CASES)
def test_sampled_texts_have_exactly_the_targets_distribution(name: str) -> None:
    case, target = CASES[name], _make_target()
    options = {"sampler": make_sampler(**case.options)}
    if case.penalty != 1:
        options["logits_processors"] = make_logits_processors(repetition_penalty=case.penalty)
    exact = _exact(target, case)
    mx.random.seed(11)

    num_accepted = 0
    ours: Counter[tuple[int, ...]] = Counter()
    for _ in range(NUM_TEXTS):
        text, telemetry = drafted(target, PROMPT, NUM_TOKENS, plan=make_plan(3, 2, 6), **options)
        ours[tuple(text)] += 1
        num_accepted += telemetry.accepted_draft_token_count
    theirs = Counter(tuple(alone(target, PROMPT, NUM_TOKENS, **options)) for _ in range(NUM_TEXTS))

    assert _p_value(ours, exact) > SIGNIFICANCE
    assert _p_value(theirs, exact) > SIGNIFICANCE
    assert num_accepted > NUM_TEXTS / 5


def test_the_same_seed_gives_the_same_text() -> None:
    target, drafter = _make_target(), make_drafter()
    texts = []
    for _ in range(2):
        mx.random.seed(5)
        texts.append(drafted(target, PROMPT, 30, drafter=drafter, sampler=make_sampler(temp=1.0))[0])

    assert texts[0] == texts[1]
