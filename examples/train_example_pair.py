"""Makes the example pair: a small language model (the target) and the ReDrafter drafter that speculates for it.

    python examples/train_example_pair.py --output DIR

The target, a Llama of 2.8M parameters, learns from `example_corpus` for `--minutes-target`, or lies in `--target`. From
`--texts` that it writes, the drafter learns for `--steps` what it would say. Seeds are fixed, but the target's training
is set in minutes, so its weights differ a little from machine to machine. Both are stored in bfloat16, and measured as
stored.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import example_drafter
import torch
from example_corpus import Document, held_out_prompts, load_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_redrafter.core.checkpoint import save_drafter
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.training.target import FrozenTarget

SEED = 2
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
CONTEXT_LENGTH = 1024
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}Assistant: {{ message['content'] }}<|endoftext|>"
    "{% else %}{{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Prose is a third of the text that there is and most of what is read, so that greedy text reads as English.
KIND_SHARES = {"topics": 0.12, "help": 0.27, "chat": 0.23, "code": 0.38}
TOKENS_PER_STEP = 4096
PEAK_LEARNING_RATE = 4e-3
WARMUP = 0.03
NODE_BUDGETS = (2, 4, 8, 16)


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` entries with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> dict[str, torch.Tensor]:
    """One stream of tokens for each kind of document, `<|endoftext|>` before and between the documents."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(SEED)).tolist()
    # The inner tokenizer works on many texts at once, and does not mind those that are longer than the context.
    encodings = tokenizer.backend_tokenizer.encode_batch([documents[index].text for index in order])
    streams: dict[str, list[int]] = {kind: [tokenizer.eos_token_id] for kind in KIND_SHARES}
    for index, encoding in zip(order, encodings, strict=True):
        streams[documents[index].kind] += [*encoding.ids, tokenizer.eos_token_id]
    return {kind: torch.tensor(stream) for kind, stream in streams.items()}


def sample_windows(
    streams: dict[str, torch.Tensor], num_windows: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """`num_windows` pieces of the streams, drawn by `KIND_SHARES`: [num_windows, length]."""
    shares = torch.tensor([KIND_SHARES[kind] for kind in streams])
    kinds = torch.multinomial(shares, num_windows, replacement=True, generator=generator).tolist()
    windows = []
    for kind in kinds:
        stream = list(streams.values())[kind]
        start = int(torch.randint(len(stream) - length, (), generator=generator))
        windows.append(stream[start : start + length])
    return torch.stack(windows)


def cosine_schedule(progress: float) -> float:
    """The learning rate's share of its peak when `progress` (0..1) of the time is over."""
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))


def progress_until(minutes: float) -> Iterator[float]:
    """The share of `minutes` that is over, again and again until it is 1."""
    start = time.monotonic()
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        yield progress


def train_target(streams: dict[str, torch.Tensor], minutes: float, directory: Path) -> LlamaForCausalLM:
    """A Llama trained from scratch for `minutes` and saved in `directory`, with weights that bfloat16 can hold."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=PEAK_LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    generator = torch.Generator().manual_seed(SEED)
    mean_loss = math.log(VOCAB_SIZE)
    for step, progress in enumerate(progress_until(minutes)):
        # Short windows first: most of what there is to learn is near, and attention costs less.
        length = 256 if progress < 0.6 else 512 if progress < 0.85 else CONTEXT_LENGTH
        windows = sample_windows(streams, TOKENS_PER_STEP // length, length, generator)  # [batch, length]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LEARNING_RATE * cosine_schedule(progress)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=windows, use_cache=False).logits  # [batch, length, vocab_size]
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean_loss += 0.02 * (loss.item() - mean_loss)
        if step % 500 == 499:
            save_target(model, directory)
        if step % 50 == 0:
            print(f"target: step {step}, {progress:.0%}, loss {mean_loss:.3f}", file=sys.stderr, flush=True)
    save_target(model, directory)
    return model.to(torch.bfloat16).float().eval()


@torch.inference_mode()
def held_out_losses(model: LlamaForCausalLM, streams: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean cross-entropy in nats per token for each kind of held-out document."""
    losses = {}
    for kind, stream in streams.items():
        windows = stream[: 40 * 512][: len(stream) // 512 * 512].view(-1, 512)  # [num_windows, 512]
        total = sum(float(model(input_ids=window[None], labels=window[None]).loss) for window in windows)
        losses[kind] = total / len(windows)
    return losses


def save_target(model: LlamaForCausalLM, directory: Path) -> None:
    """Writes the model as it is now, in bfloat16."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(directory)


def make_drafter(
    target: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    streams: dict[str, torch.Tensor],
    num_texts: int,
    steps: int,
    run: Path,
) -> ReDrafter:
    """A drafter trained on text that the target writes, continuing pieces of the streams."""
    generator = torch.Generator().manual_seed(SEED)
    frozen = FrozenTarget(target)
    documents = example_drafter.write_texts(
        frozen, lambda num_prompts, length: sample_windows(streams, num_prompts, length, generator), num_texts
    )
    return example_drafter.make_drafter(frozen, tokenizer, documents, steps, run)


def acceptance_figures(
    target: LlamaForCausalLM, drafter: ReDrafter, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> dict[str, dict[int, float]]:
    """Mean acceptance length by temperature and node budget, 64 tokens for each prompt."""
    return {
        name: {
            num_nodes: round(
                example_drafter.mean_acceptance_length(
                    target, drafter, tokenizer, prompts, num_nodes=num_nodes, num_tokens=64, temperature=temperature
                ),
                3,
            )
            for num_nodes in NODE_BUDGETS
        }
        for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0))
    }


def main() -> None:
    """Trains, writes and measures both; the last line on stdout is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for target/, drafter/ and prompts.txt")
    parser.add_argument("--minutes-target", type=float, default=20.0)
    parser.add_argument("--target", type=Path, help="a target made before, which is taken as it is")
    parser.add_argument("--texts", type=int, default=16_000, help="that the target writes for the drafter")
    parser.add_argument("--steps", type=int, default=9_000, help="of the drafter, 1024 tokens each")
    parser.add_argument("--quick", action="store_true", help="half a minute of training in all: to see that it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.minutes_target, arguments.texts, arguments.steps = 0.25, 128, 20
    target_directory, drafter_directory = arguments.output / "target", arguments.output / "drafter"

    training, held_out = load_documents()
    prompts = held_out_prompts(held_out, 24)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    if arguments.target is None:
        tokenizer = train_tokenizer(training)
        tokenizer.save_pretrained(target_directory)
        streams = encode(tokenizer, training)
        target = train_target(streams, arguments.minutes_target, target_directory)
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.target)
        streams = encode(tokenizer, training)
        target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.float32).eval()
    run = arguments.output / "run"
    drafter = make_drafter(target, tokenizer, streams, arguments.texts, arguments.steps, run)
    save_drafter(drafter, drafter_directory, torch.bfloat16)

    measured_prompts = prompts[::8] if arguments.quick else prompts
    figures = {
        "target_parameters": target.num_parameters(),
        "drafter_parameters": sum(parameter.numel() for parameter in drafter.parameters()),
        "held_out_loss": held_out_losses(target, encode(tokenizer, held_out)),
        "mean_acceptance_length": acceptance_figures(target, drafter, tokenizer, measured_prompts),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
