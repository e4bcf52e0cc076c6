"""From documents to a drafter's directory: the order of things.

OUTPUT/                  the best drafter, ready to serve: config.json, model.safetensors, tokenizer.json, and
                         provenance.json and evaluation.json, which its card is made from
OUTPUT/checkpoints/      what `resume` goes on from: the best and the last
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from vllm_redrafter import bootstrap, provenance
from vllm_redrafter.core import checkpoint
from vllm_redrafter.training import allocator
from vllm_redrafter.training.documents import Document
from vllm_redrafter.training.draft_vocabulary import DraftVocabulary, choose_draft_vocabulary
from vllm_redrafter.training.evaluation import hold_out
from vllm_redrafter.training.memory import HiddenMemory
from vllm_redrafter.training.packing import pack
from vllm_redrafter.training.recipe import ALL, Recipe, build_drafter, training_arguments
from vllm_redrafter.training.rollout import Rollout
from vllm_redrafter.training.stopping import StopOnSignal
from vllm_redrafter.training.target import FrozenTarget
from vllm_redrafter.training.trainer import ReDrafterTrainer, latest_checkpoint
from vllm_redrafter.training.transcripts import Transcript, transcribe

_WORTH_COMPILING = 400_000
"""Tokens of a run that is long enough to pay for half a minute of torch.compile."""
_MOST_HELD_OUT = 64
_OPENING_LENGTH = 32
"""Tokens of a text without a prompt that the target is given to go on from."""
_ANSWER_LENGTH = 128
"""Tokens that the target writes for every held-out document, where as many fit."""


@dataclass(frozen=True)
class Trained:
    """What a training leaves."""

    directory: Path
    num_steps: int
    stopped_early: bool
    """Whether a signal ended it: `resume` goes on."""
    acceptance_length: float | None
    """Of the drafter that was kept, on held-out texts, greedy; None where too little data was given to hold any out."""
    coverage: float
    """Share of the text to be learnt that the draft vocabulary holds."""


def load_target(name: str, revision: str | None = None, dtype: str = "auto") -> tuple[FrozenTarget, Any]:
    """Return a target with its tokenizer.

    Raises:
        ValueError: the tokenizer has tokens that the model has no embedding for.
    """
    if dtype == "auto" and not torch.accelerator.is_available():
        # what a CPU computes in half precision, autocast chooses
        dtype = "float32"
    model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    target = FrozenTarget(model)
    # ids may have gaps; a model may have more rows than there are ids
    num_tokens = 1 + max(tokenizer.get_vocab().values())
    if num_tokens > target.vocab_size:
        raise ValueError(
            f"the tokenizer of {name!r} has {num_tokens} tokens, but the model's vocabulary {target.vocab_size}: "
            "use the tokenizer that belongs to the model"
        )
    return target, tokenizer


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Return the documents to train on and those held out: the last tenth, 64 at the most."""
    num_held_out = min(_MOST_HELD_OUT, len(documents) // 10)
    cut = len(documents) - num_held_out
    return list(documents[:cut]), list(documents[cut:])


def openings(documents: Sequence[Document], max_length: int) -> list[Transcript]:
    """Return what the target is given of each document: all before its first target, of a plain text its beginning."""
    prompts = []
    for document in documents:
        first = int(document.is_target.int().argmax())
        length = first if first > 1 else min(_OPENING_LENGTH, len(document.token_ids) // 2)
        if 1 <= length < max_length:
            prompts.append(Transcript(document.token_ids, length, document.source))
    return prompts


def train(
    target: FrozenTarget,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    output: Path,
    recipe: Recipe,
    *,
    verifier: str,
    record: dict[str, Any] | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train a drafter and leave the best one in `output`, ready to serve.

    Args:
        verifier: name or path of the target, as the drafter's config will tell it.
        record: what `provenance.json` says besides versions and machine.
        resume: go on from the last checkpoint in `output`; the other arguments must be those of the run before.

    Raises:
        ValueError: nothing to resume, or a checkpoint could not be written.
        FloatingPointError: the loss is NaN or infinite.
    """
    checkpoints = output / "checkpoints"
    last = latest_checkpoint(checkpoints) if resume else None
    if resume and last is None:
        raise ValueError(f"there is no checkpoint in {str(checkpoints)!r} to resume from: train without --resume")
    train_documents, held_out_documents = split(documents)
    num_tokens = sum(len(document.token_ids) for document in train_documents)
    recipe = recipe.settled(hidden_size=target.head_weight.shape[1], num_tokens=num_tokens)
    answer_length = min(_ANSWER_LENGTH, recipe.max_length // 2)
    prompts = openings(held_out_documents, recipe.max_length - answer_length)
    arguments = training_arguments(recipe, checkpoints, evaluates=bool(prompts))
    # before a drafter borrows its head
    target.to(arguments.device)
    if arguments.device.type == "cpu":
        allocator.keep_freed_memory()
    vocabulary = _draft_vocabulary(train_documents, recipe, target)
    coverage = vocabulary.coverage if vocabulary else 1.0
    drafter = build_drafter(target, recipe, vocabulary, verifier)
    held_out = None
    if prompts:
        held_out = hold_out(target, transcribe(target, prompts, answer_length), drafter.config.fused_layers)
    stop = StopOnSignal()
    patience = [] if recipe.patience is None or held_out is None else [EarlyStoppingCallback(recipe.patience)]
    reads_again = recipe.num_tokens(num_tokens) > num_tokens
    memory = HiddenMemory(int(recipe.remembered_gib * 2**30)) if reads_again else None
    rollout = Rollout(drafter, target, recipe.objective, memory)
    if recipe.num_tokens(num_tokens) >= _WORTH_COMPILING and not bootstrap.missing_build_tools():
        rollout.compile_losses()
    trainer = ReDrafterTrainer(
        rollout,
        arguments,
        pack(train_documents, recipe.max_length),
        held_out,
        [stop, *patience, *callbacks],
    )
    # what it prints to stdout is the callbacks' to tell
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.is_world_process_zero():
        checkpoint.save_drafter(drafter, output)
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            # serving compares it with the target's
            tokenizer.backend_tokenizer.save(str(output / "tokenizer.json"))
        told = provenance.describe() | {"coverage": coverage} | (record or {})
        told |= {"target": verifier, "num_steps": trainer.state.global_step, "recipe": asdict(recipe)}
        told["documents_sha256"] = digest_documents(documents)
        (output / "provenance.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return Trained(output, trainer.state.global_step, stop.stopped, trainer.state.best_metric, coverage)


def _draft_vocabulary(documents: Sequence[Document], recipe: Recipe, target: FrozenTarget) -> DraftVocabulary | None:
    """Return the tokens that the head is to know, or None for all that the target has."""
    size = recipe.draft_vocab_size
    if size == ALL:
        return None
    assert not isinstance(size, str)
    vocabulary = choose_draft_vocabulary(documents, size, target.vocab_size)
    return None if size is None and len(vocabulary.target_ids) == target.vocab_size else vocabulary


def prepare_output(output: Path, *, overwrite: bool, resume: bool) -> None:
    """Make room for a training.

    Raises:
        ValueError: there is something already, and neither `overwrite` nor `resume` says what to do with it.
    """
    if output.is_file():
        raise ValueError(f"{str(output)!r} is a file: pass a directory")
    if resume or not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{str(output)!r} is not empty: pass --resume to go on, --overwrite to start anew, or another")
    # only what a training writes: a directory named by mistake must not be lost
    for name in ("config.json", "model.safetensors", "tokenizer.json", "provenance.json", "evaluation.json"):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def digest_documents(documents: Sequence[Document]) -> str:
    """Return the SHA-256 of all tokens, and of which of them are learnt, wherever they come from."""
    found = hashlib.sha256()
    for document in documents:
        found.update(document.token_ids.numpy().astype("<i8").tobytes() + document.is_target.numpy().tobytes())
    return found.hexdigest()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
