"""The drafter of the example pair: distilled from what the target itself would say, measured with the reference loop.

Half of the training text the target chooses greedily, half it samples, each as the continuation of a piece of corpus.
Its last hidden states, kept on the way, serve twice: as the drafter's context, and, times the target's head, as the
teacher. The loss is the cross-entropy to the teacher's whole distribution at `NUM_OFFSETS` places ahead, summed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.decoding import generate
from vllm_redrafter.core.drafter import ReDrafter

SEED = 3
NUM_OFFSETS = 5
# Short pieces of corpus: the target soon speaks for itself, as it does where it is served, and recites less.
PROMPT_LENGTH = 16
CONTINUATION_LENGTH = 160
SEQUENCES_PER_BATCH = 128
POSITIONS_PER_STEP = 1024
PEAK_LEARNING_RATE = 2e-3
DRAFT_VOCAB_SIZE = 1536
EXIT_DIM = 256
NUM_DRAFT_LAYERS = 1


class Transcript(NamedTuple):
    """Texts of the target with its view of them."""

    token_ids: torch.Tensor  # [sequences, length]
    hidden: torch.Tensor  # [sequences, length, hidden_size] float16: after the final norm


@torch.inference_mode()
def transcribe(
    target: LlamaForCausalLM, prompts: torch.Tensor, num_tokens: int, generator: torch.Generator
) -> Transcript:
    """The prompts [sequences, prompt] continued by `num_tokens`: greedily in the first half, sampled in the second."""
    cache = DynamicCache()
    columns, hidden = [prompts], []
    for _ in range(num_tokens):
        seen = target.model(input_ids=columns[-1], past_key_values=cache, use_cache=True).last_hidden_state
        hidden.append(seen.half())
        logits = target.lm_head(seen[:, -1])  # [sequences, vocab_size]
        tokens = logits.argmax(dim=-1)
        half = len(tokens) // 2
        tokens[half:] = torch.multinomial(logits[half:].softmax(dim=-1), 1, generator=generator)[:, 0]
        columns.append(tokens[:, None])
    return Transcript(torch.cat(columns, dim=1)[:, :-1], torch.cat(hidden, dim=1))


def collect(
    target: LlamaForCausalLM, sample_prompts: Callable[[int, int], torch.Tensor], until: Iterable[float]
) -> Transcript:
    """Transcripts of prompts that `sample_prompts(number, length)` draws, for as long as `until` lasts."""
    generator = torch.Generator().manual_seed(SEED)
    parts = []
    for progress in until:
        prompts = sample_prompts(SEQUENCES_PER_BATCH, PROMPT_LENGTH)
        parts.append(transcribe(target, prompts, CONTINUATION_LENGTH, generator))
        print(f"drafter: {progress:.0%} of its text written", file=sys.stderr, flush=True)
    return Transcript(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def build(target: LlamaForCausalLM, token_ids: torch.Tensor) -> ReDrafter:
    """An untrained drafter whose head starts as the target's, over the tokens most frequent in `token_ids`."""
    torch.manual_seed(SEED)
    config = ReDrafterConfig(
        hidden_size=target.config.hidden_size,
        vocab_size=target.config.vocab_size,
        exit_dim=EXIT_DIM,
        num_draft_layers=NUM_DRAFT_LAYERS,
        draft_vocab_size=DRAFT_VOCAB_SIZE,
        trained_draft_length=NUM_OFFSETS,
        verifier="examples/models/target",
        verifier_architectures=["LlamaForCausalLM"],
    )
    drafter = ReDrafter(config)
    counts = torch.bincount(token_ids.flatten(), minlength=config.vocab_size)
    frequent = counts.topk(DRAFT_VOCAB_SIZE).indices.sort().values
    drafter.set_draft_vocabulary(frequent)
    drafter.lm_head[-1].weight.data.copy_(target.lm_head.weight.data[frequent])
    return drafter


def distillation_loss(
    drafter: ReDrafter,
    target: LlamaForCausalLM,
    transcript: Transcript,
    rows: torch.Tensor,  # [positions]
    starts: torch.Tensor,  # [positions]: where h is taken; the tokens after it are given, those after them drafted
) -> torch.Tensor:
    """The cross-entropy to the target's distribution per position, summed over the offsets."""
    steps = starts[:, None] + torch.arange(1, NUM_OFFSETS + 1)
    embeddings = target.model.embed_tokens(transcript.token_ids[rows[:, None], steps])  # [positions, offsets, hidden]
    with torch.no_grad():
        teacher = target.lm_head(transcript.hidden[rows[:, None], steps].float()).softmax(dim=-1)
    ids = drafter.target_ids()
    if ids is not None:
        teacher = teacher[..., ids]
    state = drafter.start(transcript.hidden[rows, starts].float())
    logits = []
    for offset in range(NUM_OFFSETS):
        state = drafter.advance(state, embeddings[:, offset])
        logits.append(drafter.logits(state))
    log_probs = torch.stack(logits, dim=1).float().log_softmax(dim=-1)  # [positions, offsets, draft_vocab_size]
    return -(teacher * log_probs).sum(dim=(1, 2)).mean()


def train(
    drafter: ReDrafter,
    target: LlamaForCausalLM,
    transcript: Transcript,
    until: Iterable[float],
    schedule: Callable[[float], float],
) -> None:
    """Trains in place for as long as `until` lasts, then rounds the weights to what bfloat16 can hold."""
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(SEED)
    num_sequences, length = transcript.token_ids.shape
    for step, progress in enumerate(until):
        rows = torch.randint(num_sequences, (POSITIONS_PER_STEP,), generator=generator)
        starts = torch.randint(length - NUM_OFFSETS, (POSITIONS_PER_STEP,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * schedule(progress)
        with torch.autocast("cpu", torch.bfloat16):
            loss = distillation_loss(drafter, target, transcript, rows, starts)
        loss.backward()
        nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            print(f"drafter: step {step}, {progress:.0%}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    drafter.to(torch.bfloat16).float().requires_grad_(False).eval()


def mean_acceptance_length(
    target: LlamaForCausalLM,
    drafter: ReDrafter,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    num_nodes: int,
    num_tokens: int,
    temperature: float,
) -> float:
    """Tokens per verification over all prompts, `num_tokens` each; greedy at temperature 0, else sampled."""
    generator = torch.Generator().manual_seed(SEED)

    def sample(logits: torch.Tensor) -> torch.Tensor:
        if temperature == 0:
            return logits.argmax(dim=-1)
        return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)[:, 0]

    accepted: list[int] = []
    for prompt in prompts:
        ids = torch.tensor(tokenizer.encode(prompt))
        accepted += generate(target, drafter, ids, num_tokens, num_nodes=num_nodes, sample=sample).num_accepted
    return 1 + sum(accepted) / len(accepted)
