"""Tiny targets, their tokenizer, and drafters that have learnt what they say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from vllm_redrafter.core.checkpoint import save_drafter
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.core.layers import outputs_of

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
CHARACTERS = 'abcdefghijklmnopqrstuvwxyz0123456789 {}[]":,.-_+*/()ABCDEFGHI'
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)
HIDDEN_SIZE = 64
LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    # logits far apart: no greedy token hangs on float32's last digit, and the text is not one loop
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPT_LENGTHS = (3, 5, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 9, 300)


def token_prompts(lengths: Sequence[int] = PROMPT_LENGTHS, seed: int = 0) -> list[list[int]]:
    """Return prompts of ordinary tokens."""
    source = random.Random(seed)
    return [[source.randrange(len(SPECIAL_TOKENS), VOCAB_SIZE) for _ in range(length)] for length in lengths]


def make_llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random Llama."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})).eval().requires_grad_(False)


def save_target(model: PreTrainedModel, directory: Path) -> str:
    """Write a target with a tokenizer whose tokens are characters; return where."""
    model.save_pretrained(directory)
    words = [*SPECIAL_TOKENS, *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
    return str(directory)


def save_random_drafter(model: PreTrainedModel, directory: Path, seed: int = 1, **changes: Any) -> str:
    """Write a drafter that knows nothing of its target; return where."""
    torch.manual_seed(seed)
    drafter = ReDrafter(_drafter_config(model, changes))
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.mul_(2)
    save_drafter(drafter, directory)
    return str(directory)


def save_trained_drafter(
    model: PreTrainedModel,
    directory: Path,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int = 64,
    num_steps: int = 250,
    **changes: Any,
) -> str:
    """Write a drafter that has learnt what its target says after `prompts`, greedily and at T=1; return where."""
    depth = 4
    drafter = ReDrafter(_drafter_config(model, changes))
    hidden, tokens = [], []  # [positions, input_size] and [positions, depth + 1]
    torch.manual_seed(2)
    for prompt in prompts:
        for temperature in (0.0, 1.0):
            text = _continue(model, list(prompt), num_tokens, temperature)
            starts = range(len(prompt) - 1, len(text) - depth - 1)
            hidden.append(_handed_over(model, text, drafter.config.fused_layers)[list(starts)])
            tokens.append(torch.tensor([text[start + 1 : start + depth + 2] for start in starts]))
    if drafter.config.tie_lm_head:
        drafter.tie_head(model.get_output_embeddings().weight)
    _train(drafter, model.get_input_embeddings().weight, torch.cat(hidden), torch.cat(tokens), num_steps)
    save_drafter(drafter, directory)
    return str(directory)


def _drafter_config(model: PreTrainedModel, changes: dict[str, Any]) -> ReDrafterConfig:
    config = model.config.get_text_config()
    sizes = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size, "num_draft_layers": 1}
    return ReDrafterConfig(**{**sizes, "num_speculative_tokens": 16, "trained_draft_length": 16, **changes})


def _train(
    drafter: ReDrafter,
    table: torch.Tensor,  # [vocab_size, hidden_size]: the rows as they are, which some models' embeddings scale
    hidden: torch.Tensor,  # [positions, input_size]
    tokens: torch.Tensor,  # [positions, depth + 1]: the token chosen there, then what follows
    num_steps: int,
) -> None:
    optimizer = torch.optim.Adam(drafter.parameters(), lr=5e-3)
    with torch.enable_grad():
        for _ in range(num_steps):
            rows = torch.randint(len(tokens), (512,))
            state = drafter.start(hidden[rows])
            loss = torch.zeros(())
            for depth in range(1, tokens.shape[1]):
                state = drafter.advance(state, table[tokens[rows, depth - 1]])
                loss = loss + functional.cross_entropy(drafter.logits(state), tokens[rows, depth])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.inference_mode()
def _continue(model: PreTrainedModel, text: list[int], num_tokens: int, temperature: float) -> list[int]:
    """Return a text with `num_tokens` more."""
    cache, new = None, text
    for _ in range(num_tokens):
        output = model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[0, -1].float()
        token = int(logits.softmax(0).multinomial(1)) if temperature else int(logits.argmax())
        new = [token]
        text = [*text, token]
    return text


@torch.no_grad()
def _handed_over(model: PreTrainedModel, text: list[int], fused_layers: list[int] | None) -> torch.Tensor:
    """Return what the target hands the drafter, [tokens, input_size]."""
    heard: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    with outputs_of(model, fused_layers) as outputs:
        model(input_ids=torch.tensor([text]))
    hook.remove()
    return torch.cat((heard[0], *outputs), dim=-1)[0].float()
