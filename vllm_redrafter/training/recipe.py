"""The numbers that a training may be given, and what is made of them: a drafter, and the arguments of a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.core.layers import find_layers
from vllm_redrafter.training.draft_vocabulary import DraftVocabulary
from vllm_redrafter.training.rollout import Objective
from vllm_redrafter.training.target import FrozenTarget

_TOKENS_PER_BATCH = 1024
"""Small steps, many of them: the same tokens in larger ones leave a worse drafter."""
_EPOCHS = 3.0
_FEWEST_TOKENS = 12_000_000

ALL = "all"
"""A draft vocabulary of every token that the target has."""


@dataclass(frozen=True)
class Recipe:
    """How a drafter is built and trained; the defaults suit a target of any size."""

    objective: Objective = field(default_factory=Objective)
    exit_dim: int | None = None
    """Width of blocks and head; None for twice the hidden size, as Apple's drafters have it."""
    num_draft_layers: int = 2
    rnn: bool = True
    draft_vocab_size: int | str | None = None
    """Tokens that the head knows, the most frequent ones of the data: None for those that make up 98% of it, `ALL`."""
    tie_lm_head: bool = False
    fused_layers: tuple[int, ...] = ()
    """Layers of the target, counted from 0, whose outputs the drafter sees besides the last hidden state."""
    beam_width: int = 4
    num_speculative_tokens: int = 8
    max_length: int = 2048
    """Tokens of a packed sequence, and the most of a document."""
    epochs: float | None = None
    """Passes over the data; None for three, and for more where those would be fewer than 12M tokens."""
    remembered_gib: float = 4.0
    """Memory of each process for what the target said of the data, so that a second pass need not run it."""
    max_steps: int | None = None
    batch_size: int | None = None
    """Packed sequences per process and pass; None for as many as hold 1024 tokens, and one at least."""
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    """Its peak; None for one that falls with the root of the target's width, 0.06 / sqrt(hidden_size)."""
    warmup: float = 0.05
    """Share of the steps during which the learning rate rises."""
    num_evaluations: int = 10
    patience: int | None = None
    """Evaluations without a longer acceptance before the training ends early; None never ends it."""
    bf16: bool | None = None
    """Whether products are computed in bf16; None for where that is native."""
    seed: int = 0
    report_to: tuple[str, ...] = ()
    """`tensorboard`, `wandb`: where figures go besides the terminal."""

    def settled(self, *, hidden_size: int, num_tokens: int) -> Recipe:
        """Return this recipe with what it leaves open chosen for a target of that width and that much data."""
        learning_rate = 0.06 / hidden_size**0.5 if self.learning_rate is None else self.learning_rate
        batch_size = max(1, _TOKENS_PER_BATCH // self.max_length) if self.batch_size is None else self.batch_size
        epochs = max(_EPOCHS, _FEWEST_TOKENS / num_tokens) if self.epochs is None else self.epochs
        return replace(self, learning_rate=learning_rate, batch_size=batch_size, epochs=epochs)

    def num_tokens(self, num_tokens: int) -> float:
        """Return how many tokens a settled recipe makes a process read, of data that has so many."""
        if self.max_steps is None:
            assert self.epochs is not None
            return self.epochs * num_tokens
        assert self.batch_size is not None
        return self.max_steps * self.gradient_accumulation * self.batch_size * self.max_length


QUICK = Recipe(
    objective=Objective(num_offsets=5),
    exit_dim=256,
    num_draft_layers=1,
    draft_vocab_size=1536,
    max_length=512,
    max_steps=900,
    num_evaluations=3,
)
"""For a target of a few million parameters, in minutes on two cores."""


def choose(base: Recipe, given: Mapping[str, Any], target: FrozenTarget) -> Recipe:
    """Return `base` with what a user gave, fields of the objective included, made to fit the target.

    Raises:
        ValueError: a sequence would be longer than the target's positions, or a field is out of range.
        NotImplementedError: the target's layers cannot be listened to.
    """
    names = {name.name for name in fields(Objective)}
    objective = replace(base.objective, **{name: value for name, value in given.items() if name in names})
    recipe = replace(base, objective=objective, **{name: value for name, value in given.items() if name not in names})
    if recipe.fused_layers:
        find_layers(target.model, recipe.fused_layers)
    longest = target.max_length
    if longest is None or recipe.max_length <= longest:
        return recipe
    if "max_length" in given:
        raise ValueError(
            f"max_length is {recipe.max_length}, but the target has {longest} positions: ask for {longest} at most"
        )
    return replace(recipe, max_length=longest)


def build_drafter(target: FrozenTarget, recipe: Recipe, vocabulary: DraftVocabulary | None, verifier: str) -> ReDrafter:
    """Return an untrained drafter whose head starts as the target's, in as many columns as both have."""
    hidden_size = target.head_weight.shape[1]
    config = ReDrafterConfig(
        hidden_size=hidden_size,
        vocab_size=target.vocab_size,
        exit_dim=hidden_size if recipe.tie_lm_head else recipe.exit_dim,
        num_draft_layers=recipe.num_draft_layers,
        rnn=recipe.rnn,
        draft_vocab_size=None if vocabulary is None else len(vocabulary.target_ids),
        tie_lm_head=recipe.tie_lm_head,
        fused_layers=sorted(recipe.fused_layers) or None,
        beam_width=recipe.beam_width,
        draft_length=recipe.objective.num_offsets,
        num_speculative_tokens=recipe.num_speculative_tokens,
        trained_draft_length=recipe.objective.num_offsets,
        verifier=verifier,
        verifier_architectures=[type(target.model).__name__],
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        drafter = ReDrafter(config)
    rows = target.head_weight.float()
    if vocabulary is not None:
        drafter.set_draft_vocabulary(vocabulary.target_ids)
        rows = rows[vocabulary.target_ids.to(rows.device)]
    if recipe.tie_lm_head:
        drafter.tie_head(target.head_weight)
    else:
        shared = min(hidden_size, config.exit_dim)
        head: Any = drafter.lm_head[-1]
        with torch.no_grad():
            head.weight.zero_()
            head.weight[:, :shared] = rows[:, :shared].cpu()
    return drafter


def training_arguments(recipe: Recipe, checkpoints: Path, *, evaluates: bool) -> TrainingArguments:
    """Return what `transformers.Trainer` takes of a settled recipe; `evaluates` says whether there is a measure."""
    assert recipe.epochs is not None
    assert recipe.batch_size is not None
    assert recipe.learning_rate is not None
    # below 1 it is a share of the steps; 1 itself would be every step
    interval = min(1 / recipe.num_evaluations, 1 - 1e-9)
    strategy = "steps" if evaluates else "no"
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=0.01,
        # the second moment follows a loss that falls fast at the beginning
        adam_beta2=0.98,
        bf16=_has_bf16() if recipe.bf16 is None else recipe.bf16,
        use_cpu=not torch.accelerator.is_available(),
        eval_strategy=strategy,
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=2,
        load_best_model_at_end=evaluates,
        metric_for_best_model="acceptance_length" if evaluates else None,
        greater_is_better=True if evaluates else None,
        logging_steps=interval / 5,
        report_to=list(recipe.report_to),
        seed=recipe.seed,
        # a batch is made of tensors that the rollout takes as they are
        remove_unused_columns=False,
        disable_tqdm=True,
        # every rank divides by the targets of all: nothing is left to average
        average_tokens_across_devices=False,
    )


def _has_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()
