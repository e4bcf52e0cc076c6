"""Texts that the target writes by itself, within this process: what a drafter is measured on, and `train --quick`.

`distill` has vLLM write them, which is how training text is made for a large target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vllm_redrafter.core.noise import draw_seeds, gumbel
from vllm_redrafter.training.target import FrozenTarget

_PROMPTS_AT_ONCE = 64


class Transcript(NamedTuple):
    """A prompt and how the target went on."""

    token_ids: torch.Tensor  # [length]: the token that ended the text, if one did, is the last
    num_prompt_tokens: int
    source: str
    seed: int | None = None
    """Of the `NoisySampler` that drew the answer; None where none did."""


def transcribe(
    target: FrozenTarget,
    prompts: Sequence[Transcript],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Transcript]:
    """Return what the target makes of each prompt: greedily at temperature 0, else sampled from all tokens.

    Args:
        prompts: transcripts of which the first `num_prompt_tokens` tokens are taken, at least one.
        seed: what the seeds of the answers are drawn from.
    """
    if temperature:
        seeds = draw_seeds(torch.Generator().manual_seed(seed), len(prompts)).tolist()
        prompts = [prompt._replace(seed=own) for prompt, own in zip(prompts, seeds, strict=True)]
    else:
        prompts = [prompt._replace(seed=None) for prompt in prompts]
    # prompts of like length stand together: what pads the shorter ones is computed as well
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].num_prompt_tokens)
    written: dict[int, Transcript] = {}
    with torch.inference_mode():
        for start in range(0, len(order), _PROMPTS_AT_ONCE):
            indices = order[start : start + _PROMPTS_AT_ONCE]
            texts = _continue(target, [prompts[i] for i in indices], max_new_tokens, temperature)
            written.update(zip(indices, texts, strict=True))
    return [written[i] for i in range(len(prompts))]


def _continue(
    target: FrozenTarget, prompts: Sequence[Transcript], max_new_tokens: int, temperature: float
) -> list[Transcript]:
    samplers = [_Noise(temperature, prompts)] if temperature else []
    stops = target.stop_token_ids
    # every field that a target's own generation config may set otherwise
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=0,
        repetition_penalty=1.0,
    )
    longest = max(prompt.num_prompt_tokens for prompt in prompts)
    token_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(token_ids)
    for row, prompt in enumerate(prompts):
        token_ids[row, longest - prompt.num_prompt_tokens :] = prompt.token_ids[: prompt.num_prompt_tokens]
        attention_mask[row, longest - prompt.num_prompt_tokens :] = 1
    device = target.device
    answers = target.model.generate(
        input_ids=token_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=config,
        logits_processor=LogitsProcessorList(samplers),
    )[:, longest:].cpu()
    return [
        prompt._replace(token_ids=torch.cat((prompt.token_ids[: prompt.num_prompt_tokens], _until_stop(answer, stops))))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


class _Noise(LogitsProcessor):
    """Makes the best token the one that a `NoisySampler` with the prompt's seed draws."""

    def __init__(self, temperature: float, prompts: Sequence[Transcript]) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator().manual_seed(each.seed) for each in prompts if each.seed is not None]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seeds = torch.cat([draw_seeds(generator, 1) for generator in self._generators]).to(scores.device)
        noise = gumbel(seeds, torch.arange(scores.shape[1], device=scores.device))
        return scores.float() / self._temperature + noise


def _until_stop(answer: torch.Tensor, stop_token_ids: Sequence[int]) -> torch.Tensor:
    """Return the tokens up to the first that ends the text, that one included."""
    ends = torch.isin(answer, torch.tensor(stop_token_ids, dtype=answer.dtype)).nonzero()
    return answer[: int(ends[0]) + 1] if len(ends) else answer
