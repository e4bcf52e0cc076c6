"""From documents to a directory that serves, with a record of how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, TrainerState

from tests.engine.tiny_models import make_llama, save_target
from tests.training.small import HIDDEN, VOCAB, make_documents, make_drafter, make_target
from vllm_redrafter.core import checkpoint
from vllm_redrafter.training import run
from vllm_redrafter.training.documents import Document
from vllm_redrafter.training.draft_vocabulary import DraftVocabulary
from vllm_redrafter.training.recipe import Recipe, build_drafter, choose, training_arguments
from vllm_redrafter.training.rollout import Objective, Rollout
from vllm_redrafter.training.target import FrozenTarget

FAST: dict[str, Any] = {"max_length": 32, "max_steps": 4, "batch_size": 2, "num_evaluations": 2, "bf16": False}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    target = save_target(make_llama(), tmp_path_factory.mktemp("target"))
    return PreTrainedTokenizerFast.from_pretrained(target)


def train(documents: list[Document], output: Path, tokenizer: Any, recipe: Recipe, **options: Any) -> run.Trained:
    return run.train(make_target(), tokenizer, documents, output, recipe, verifier="someone/target", **options)


def test_what_is_left_serves_and_says_how_it_was_made(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = make_documents(*[20, 14, 30, 9] * 6)
    recipe = Recipe(**FAST, exit_dim=24, draft_vocab_size=30, num_speculative_tokens=6)

    trained = train(documents, tmp_path, tokenizer, recipe, record={"data": [{"name": "d.jsonl", "sha256": "0"}]})

    drafter = checkpoint.load_drafter(tmp_path)
    config = drafter.config
    assert (config.exit_dim, config.draft_vocab_size, config.num_speculative_tokens) == (24, 30, 6)
    assert (config.verifier, config.verifier_architectures) == ("someone/target", ["LlamaForCausalLM"])
    assert config.draft_length == config.trained_draft_length == 6
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]["<s>"] == 1
    told = json.loads((tmp_path / "provenance.json").read_text())
    assert told["target"] == "someone/target"
    assert told["data"] == [{"name": "d.jsonl", "sha256": "0"}]
    assert told["recipe"]["objective"]["loss"] == "kl"
    assert 0.5 < told["coverage"] < 1
    assert trained.coverage == told["coverage"]
    assert {"torch", "transformers"} <= told["versions"].keys()
    assert (trained.num_steps, trained.stopped_early) == (4, False)
    assert trained.acceptance_length is not None
    assert trained.acceptance_length >= 1


@pytest.mark.parametrize(
    ("size", "found"),
    [(None, None), ("all", None), (VOCAB, VOCAB)],
    ids=["as many as 64, which are all", "all", "as many as there are"],
)
def test_a_head_that_knows_every_token_needs_no_draft_vocabulary(
    size: Any, found: int | None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    trained = train(make_documents(*[20, 14, 30, 9] * 6), tmp_path, tokenizer, Recipe(**FAST, draft_vocab_size=size))

    assert checkpoint.load_drafter(tmp_path).config.draft_vocab_size == found
    assert trained.coverage == 1


@pytest.mark.parametrize(
    ("most_steps", "missing", "compiles"), [(4, [], False), (900, [], True), (900, ["g++"], False)]
)
def test_a_run_compiles_where_it_is_long_and_there_is_a_compiler(
    most_steps: int,
    missing: list[str],
    compiles: bool,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[Rollout] = []
    monkeypatch.setattr(Rollout, "compile_losses", lambda self: compiled.append(self))
    monkeypatch.setattr(run.bootstrap, "missing_build_tools", lambda: missing)
    # 64 tokens a step
    monkeypatch.setattr(run, "_WORTH_COMPILING", 900 * 64)
    monkeypatch.setattr(run.ReDrafterTrainer, "train", lambda self, resume_from_checkpoint: None)

    train(make_documents(*[20, 14, 30, 9] * 6), tmp_path, tokenizer, Recipe(**FAST | {"max_steps": most_steps}))

    assert len(compiled) == compiles


def test_a_second_pass_over_the_data_does_not_run_the_target(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    hidden = FrozenTarget._hidden

    def counted(self: FrozenTarget, fused_layers: Any, **inputs: torch.Tensor) -> torch.Tensor:
        # documents are packed where there are positions
        runs.extend([None] * ("position_ids" in inputs))
        return hidden(self, fused_layers, **inputs)

    monkeypatch.setattr(FrozenTarget, "_hidden", counted)
    documents, nums_runs = make_documents(*[20, 14, 30, 9] * 6), []
    for gib in (0.0, 1.0):
        runs.clear()
        recipe = Recipe(**FAST | {"max_steps": None}, epochs=3, remembered_gib=gib)
        train(documents, tmp_path / str(gib), tokenizer, recipe)
        nums_runs.append(len(runs))

    assert nums_runs[0] == 3 * nums_runs[1] > 0
    forgetful, remembering = (checkpoint.load_drafter(tmp_path / str(gib)).state_dict() for gib in (0.0, 1.0))
    for name, tensor in forgetful.items():
        torch.testing.assert_close(remembering[name], tensor)


def test_a_training_that_ended_goes_on_from_its_last_checkpoint(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    documents = make_documents(*[20, 14, 30, 9] * 6)
    train(documents, tmp_path / "straight", tokenizer, Recipe(**FAST))
    # as if it had been killed after its first checkpoint
    train(documents, tmp_path / "stopped", tokenizer, Recipe(**FAST))
    for path in ("config.json", "model.safetensors", "checkpoints/checkpoint-4/trainer_state.json"):
        (tmp_path / "stopped" / path).unlink()

    train(documents, tmp_path / "stopped", tokenizer, Recipe(**FAST), resume=True)

    straight = checkpoint.load_drafter(tmp_path / "straight")
    resumed = checkpoint.load_drafter(tmp_path / "stopped")
    for found, expected in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_there_must_be_something_to_resume(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint in .* to resume from: train without --resume"):
        train(make_documents(20), tmp_path, tokenizer, Recipe(**FAST), resume=True)


def test_too_few_documents_are_all_trained_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trained = train(make_documents(20, 14, 9), tmp_path, tokenizer, Recipe(**FAST))

    assert trained.acceptance_length is None
    assert checkpoint.load_drafter(tmp_path).config.hidden_size == HIDDEN


def test_the_last_tenth_is_held_out() -> None:
    documents = make_documents(*range(5, 45))

    kept, held_out = run.split(documents)

    assert [len(document.token_ids) for document in held_out] == [41, 42, 43, 44]
    assert len(kept) == 36


def test_the_target_is_given_the_prompt_or_the_beginning_of_a_text() -> None:
    answer, text, long = make_documents(40, num_prompt_tokens=12) + make_documents(90, 50, num_prompt_tokens=0)

    prompts = run.openings([answer, text, long, *make_documents(40, num_prompt_tokens=31)], 31)

    assert [prompt.num_prompt_tokens for prompt in prompts] == [12, 25]


def test_a_directory_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    output = tmp_path / "drafter"
    run.prepare_output(output, overwrite=False, resume=False)
    output.mkdir()
    run.prepare_output(output, overwrite=False, resume=False)
    (output / "config.json").write_text("{}")
    (output / "notes.txt").write_text("mine")

    with pytest.raises(
        ValueError, match=r"is not empty: pass --resume to go on, --overwrite to start anew, or another"
    ):
        run.prepare_output(output, overwrite=False, resume=False)
    run.prepare_output(output, overwrite=True, resume=False)

    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="is a file: pass a directory"):
        run.prepare_output(output / "notes.txt", overwrite=True, resume=False)


def test_a_head_begins_as_the_targets_rows_of_the_draft_vocabulary() -> None:
    target, ids = make_target(), torch.arange(1, VOCAB, 3)

    drafter = build_drafter(target, Recipe(exit_dim=24), DraftVocabulary(ids, 0.9), "t")

    head: Any = drafter.lm_head[-1]
    assert torch.equal(head.weight[:, :HIDDEN], target.head_weight[ids])
    assert head.weight[:, HIDDEN:].count_nonzero() == 0
    assert drafter.target_ids() is not None
    assert torch.equal(drafter.target_ids(), ids)


def test_a_tied_drafter_has_no_head_of_its_own() -> None:
    drafter = build_drafter(make_target(), Recipe(tie_lm_head=True), None, "t")

    assert drafter.config.exit_dim == HIDDEN
    assert all(parameter.shape != (VOCAB, HIDDEN) for parameter in drafter.parameters())


@pytest.mark.parametrize("num_evaluations", [1, 2, 3, 10])
def test_the_drafter_is_evaluated_as_often_as_wanted(num_evaluations: int, tmp_path: Path) -> None:
    recipe = Recipe(max_steps=60, num_evaluations=num_evaluations).settled(hidden_size=16, num_tokens=1000)

    state = TrainerState()
    state.compute_steps(training_arguments(recipe, tmp_path, evaluates=True), 60)

    assert 60 // state.eval_steps == num_evaluations
    assert state.save_steps == state.eval_steps


def test_what_is_left_open_is_chosen_for_the_target_and_the_data() -> None:
    small = Recipe(max_length=512).settled(hidden_size=400, num_tokens=1_000_000)
    large = Recipe(max_length=2048).settled(hidden_size=4096, num_tokens=100_000_000)
    given = Recipe(learning_rate=0.1, batch_size=3, epochs=0.5).settled(hidden_size=400, num_tokens=1_000_000)
    assert given.num_tokens(1_000_000) == 500_000
    assert Recipe(**FAST, gradient_accumulation=3).num_tokens(1) == 4 * 3 * 2 * 32

    assert (small.learning_rate, small.batch_size, small.epochs) == (pytest.approx(0.003), 2, 12)
    assert (large.learning_rate, large.batch_size, large.epochs) == (pytest.approx(0.06 / 64), 1, 3)
    assert (given.learning_rate, given.batch_size, given.epochs) == (0.1, 3, 0.5)


def test_what_a_user_gives_replaces_the_defaults_and_fits_the_target() -> None:
    target = make_target()

    recipe = choose(Recipe(), {"loss": "lk", "num_offsets": 3, "exit_dim": 8}, target)

    assert recipe.objective == Objective(loss="lk", num_offsets=3)
    assert (recipe.exit_dim, recipe.max_length) == (8, 64)
    with pytest.raises(ValueError, match="max_length is 65, but the target has 64 positions: ask for 64 at most"):
        choose(Recipe(), {"max_length": 65}, target)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    save_target(make_llama(vocab_size=40), tmp_path)

    with pytest.raises(
        ValueError, match="has 64 tokens, but the model's vocabulary 40: use the tokenizer that belongs"
    ):
        run.load_target(str(tmp_path))


def test_figures_go_to_tensorboard_where_that_is_asked_for(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    documents = make_documents(*[20, 14, 30, 9] * 6)

    train(documents, tmp_path, tokenizer, Recipe(**FAST, report_to=("tensorboard",)))

    (file,) = tmp_path.glob("checkpoints/**/events.out.tfevents.*")
    written = events.EventAccumulator(str(file)).Reload()
    told = set(written.Tags()["scalars"])
    assert {"train/loss", "train/loss_offset_5", "train/top1_offset_1", "eval/acceptance_length"} <= told


def test_figures_go_to_wandb_offline_where_that_is_asked_for(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)

    train(make_documents(*[20, 14, 30, 9] * 6), tmp_path / "drafter", tokenizer, Recipe(**FAST, report_to=("wandb",)))

    told = dict(wandb.run.summary)
    wandb.finish()
    assert {"train/loss", "train/loss_offset_5", "train/top1_offset_1", "eval/acceptance_length"} <= told.keys()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_the_data_is_told_by_its_tokens_wherever_it_comes_from() -> None:
    documents = make_documents(20, 14)

    assert run.digest_documents(documents) == run.digest_documents(make_documents(20, 14))
    assert run.digest_documents(documents) != run.digest_documents(documents[::-1])
    assert run.digest_documents(documents) != run.digest_documents(
        [d._replace(is_target=~d.is_target) for d in documents]
    )


def test_a_drafter_is_not_lost_to_a_seed_elsewhere() -> None:
    torch.manual_seed(1)
    first = build_drafter(make_target(), Recipe(seed=3), None, "t")
    torch.manual_seed(2)
    second = build_drafter(make_target(), Recipe(seed=3), None, "t")

    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.rnn_u.weight, make_drafter().rnn_u.weight)
