"""Every architecture, and every kind of drafter: same text as plain vLLM, same drafts as the reference loop."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import PreTrainedModel

from tests.engine import tiny_models
from tests.engine.architectures import SLIDING_WINDOW, TARGETS
from tests.engine.engine_process import Engine, EnginePool, Request, Workload, assert_same_answers
from vllm_redrafter.core import decoding
from vllm_redrafter.core.beam_search import SHARPNESS
from vllm_redrafter.core.checkpoint import load_drafter, save_drafter
from vllm_redrafter.core.drafter import ReDrafter

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "detokenize": False}
SEEDED = {**GREEDY, "temperature": 1.0}
FIXED: dict[str, Any] = {"budget": "fixed", "num_speculative_tokens": 12, "beam_width": 4, "draft_length": 4}
NUM_SHORT_TOKENS = 36
# a text that may not repeat itself leaves the paths that the drafter knows, now and then
PENALTIES = (1.0, 1.4)
# prompt and text stay inside the sliding window: the reference loop keeps all tokens of all layers
SHORT_PROMPTS = tiny_models.token_prompts([3, 5, 6, 8], seed=11)
# below, at and beyond the window and the block, and beyond a chunk
LONG_PROMPTS = tiny_models.token_prompts([31, 33, 47, 48, 49, 96, 150], seed=12)
PROMPTS = [*SHORT_PROMPTS, *LONG_PROMPTS]


class Pair(NamedTuple):
    model: PreTrainedModel
    target: str
    drafter: str

    def drafted(self) -> Engine:
        return Engine(self.target, self.drafter, FIXED)

    def plain(self) -> Engine:
        return Engine(self.target, options={"max_num_batched_tokens": 8192})


@pytest.fixture(scope="module", params=TARGETS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("architecture")
    model = TARGETS[request.param]()
    target = tiny_models.save_target(model, directory / "target")
    return Pair(model, target, _save_trained_drafter(model, directory / "drafter"))


@pytest.fixture(scope="module")
def padded_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A Llama whose vocabulary vLLM pads, from 70 rows to 128; the last 6 are unknown to the tokenizer."""
    directory = tmp_path_factory.mktemp("variants")
    model = tiny_models.make_llama(vocab_size=70)
    target = tiny_models.save_target(model, directory / "target")
    return Pair(model, target, _save_trained_drafter(model, directory / "drafter"))


def test_text_is_that_of_plain_vllm(engines: EnginePool, pair: Pair) -> None:
    _assert_same_text(engines, pair)


def test_drafts_are_those_of_the_reference_loop(engines: EnginePool, pair: Pair) -> None:
    _assert_same_drafts(engines, pair)


@pytest.mark.parametrize("name", ["Gemma 2", "Gemma 3"])
def test_gemma_is_drafted_for_from_rows_of_the_table_which_its_own_embedding_scales(name: str) -> None:
    model = TARGETS[name]()
    embedding = model.get_input_embeddings()
    token_ids = torch.arange(4)

    rows = decoding.Target(model, SLIDING_WINDOW).embed(token_ids)

    # that vLLM lends the drafter the same rows is what the tests above show: with others it would draft other tokens
    assert torch.equal(rows, functional.embedding(token_ids, embedding.weight))
    assert not torch.allclose(rows, embedding(token_ids))


def _tied(pair: Pair, directory: Path) -> str:
    return _save_trained_drafter(pair.model, directory, tie_lm_head=True, exit_dim=tiny_models.HIDDEN_SIZE)


def _tied_over_a_draft_vocabulary(pair: Pair, directory: Path) -> str:
    return _with_draft_vocabulary(Path(_tied(pair, directory / "whole")), directory)


def _own_head_over_a_draft_vocabulary(pair: Pair, directory: Path) -> str:
    return _with_draft_vocabulary(Path(pair.drafter), directory)


def _without_rnn(pair: Pair, directory: Path) -> str:
    return _save_trained_drafter(pair.model, directory, rnn=False)


def _with_fused_layers(pair: Pair, directory: Path) -> str:
    return _save_trained_drafter(pair.model, directory, fused_layers=[0, 1])


def _in_apples_format(pair: Pair, directory: Path) -> str:
    tensors = load_file(Path(pair.drafter, "model.safetensors"))
    config = load_drafter(pair.drafter).config
    directory.mkdir()
    # stored, but in no forward pass
    tensors["emb_norm.weight"] = torch.full((config.hidden_size,), 7.0)
    save_file(tensors, directory / "model.safetensors")
    fields = {
        "model_type": "recurrent_drafting_drafter",
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "exit_dim": config.exit_dim,
        "num_draft_layers": config.num_draft_layers,
        "rnn": True,
        "emb_norm": True,
    }
    (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return str(directory)


def _stored_in_bf16(pair: Pair, directory: Path) -> str:
    save_drafter(load_drafter(pair.drafter), directory, torch.bfloat16)
    return str(directory)


VARIANTS: dict[str, Callable[[Pair, Path], str]] = {
    "tied head": _tied,
    "tied head over a draft vocabulary": _tied_over_a_draft_vocabulary,
    "own head over a draft vocabulary": _own_head_over_a_draft_vocabulary,
    "no RNN": _without_rnn,
    "fused layers": _with_fused_layers,
    "Apple's format": _in_apples_format,
    "stored in bf16": _stored_in_bf16,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_drafter_drafts_as_in_the_reference_loop_and_changes_no_token(
    engines: EnginePool, padded_pair: Pair, tmp_path: Path, variant: str
) -> None:
    pair = padded_pair._replace(drafter=VARIANTS[variant](padded_pair, tmp_path / "drafter"))

    _assert_same_text(engines, pair)
    _assert_same_drafts(engines, pair)


@pytest.mark.parametrize("name", ["Llama with as many key as query heads", "Qwen3"])
def test_what_leaves_fused_layers_is_what_training_sees(engines: EnginePool, name: str, tmp_path: Path) -> None:
    model = TARGETS[name]()
    target = tiny_models.save_target(model, tmp_path / "target")
    drafter = tiny_models.save_random_drafter(model, tmp_path / "drafter", fused_layers=[0, 1])
    requests = [Request(prompt, GREEDY) for prompt in PROMPTS]

    drafted = engines.run(Engine(target, drafter, FIXED), Workload(requests, "expect_the_states_of_training"))

    assert drafted.stats["num_drafts"] > 100
    assert drafted.stats["num_branch_acceptances"] > 0


def test_a_compiled_target_hands_out_the_layers_that_each_drafter_asks_for(
    engines: EnginePool, padded_pair: Pair, tmp_path: Path
) -> None:
    workload = Workload([Request(prompt, GREEDY) for prompt in SHORT_PROMPTS], "expect_the_states_of_training")
    for layer in (0, 1):
        drafter = tiny_models.save_random_drafter(padded_pair.model, tmp_path / str(layer), fused_layers=[layer])

        # from the second on, a compiled graph of the same target may lie in a cache
        drafted = engines.run(Engine(padded_pair.target, drafter, FIXED, {"enforce_eager": None}), workload)

        assert drafted.stats["num_drafts"] > 100


def _save_trained_drafter(model: PreTrainedModel, directory: Path, **changes: object) -> str:
    return tiny_models.save_trained_drafter(
        model, directory, PROMPTS, num_tokens=SLIDING_WINDOW - 8, num_steps=150, **changes
    )


def _with_draft_vocabulary(source: Path, directory: Path) -> str:
    """Write the drafter at `source` with two thirds of its vocabulary."""
    whole = load_drafter(source)
    ids = torch.tensor([token for token in range(whole.config.vocab_size) if token % 3])
    config = copy.deepcopy(whole.config)
    config.draft_vocab_size = len(ids)
    drafter = ReDrafter(config)
    state = whole.state_dict()
    if not config.tie_lm_head:
        head = f"lm_head.{config.num_draft_layers}.weight"
        state[head] = state[head][ids]
    drafter.load_state_dict(state, strict=False)
    drafter.set_draft_vocabulary(ids)
    save_drafter(drafter, directory)
    return str(directory)


def _assert_same_text(engines: EnginePool, pair: Pair) -> None:
    workload = Workload(
        [Request(prompt, GREEDY) for prompt in PROMPTS]
        + [Request(prompt, {**SEEDED, "seed": seed}) for seed, prompt in enumerate(PROMPTS)]
    )

    drafted = engines.run(pair.drafted(), workload)

    assert_same_answers(drafted, engines.run(pair.plain(), workload))
    assert drafted.stats["num_branch_acceptances"] > 0
    assert drafted.stats["num_commits"] > 0


def _assert_same_drafts(engines: EnginePool, pair: Pair) -> None:
    """Compare with `core.decoding`: what is accepted hangs on the hidden states and embeddings that the drafter gets.

    Counts are equal, not close: they would differ only where two candidates' scores tie in float32's last digits.
    """
    requests = [(prompt, penalty) for prompt in SHORT_PROMPTS for penalty in PENALTIES]
    references = _reference(pair, requests)
    accepted = [count for reference in references for count in reference.num_accepted]
    greedy = {**GREEDY, "max_tokens": NUM_SHORT_TOKENS}
    workload = Workload([Request(prompt, {**greedy, "repetition_penalty": penalty}) for prompt, penalty in requests])

    drafted = engines.run(pair.drafted(), workload)

    assert drafted.token_ids() == [[reference.token_ids] for reference in references]
    assert drafted.stats["num_steps"] == len(accepted)
    assert drafted.stats["accepted_by_depth"] == [
        sum(count > depth for count in accepted) for depth in range(max(accepted))
    ]
    assert max(accepted) > 1


def _reference(pair: Pair, requests: Sequence[tuple[list[int], float]]) -> list[decoding.Generation]:
    """Return what the reference loop makes of prompts with repetition penalties."""
    drafter = load_drafter(pair.drafter)
    shape = decoding.BeamShape(FIXED["beam_width"], FIXED["draft_length"])
    return [
        decoding.generate(
            pair.model,
            drafter,
            torch.tensor(prompt),
            NUM_SHORT_TOKENS,
            shape=shape,
            num_nodes=FIXED["num_speculative_tokens"],
            sample=_penalised(prompt, penalty),
            sharpness=SHARPNESS,
        )
        for prompt, penalty in requests
    ]


def _penalised(prompt: list[int], penalty: float) -> decoding.Sample:
    """Return a sampler of the most probable token once those of the text are made less so, as vLLM does it."""
    text = list(prompt)

    def sample(logits: torch.Tensor) -> torch.Tensor:  # [1, vocab] -> [1]
        seen = logits[:, text]
        token = logits.index_copy(1, torch.tensor(text), torch.where(seen > 0, seen / penalty, seen * penalty)).argmax(
            1
        )
        text.append(int(token))
        return token

    return sample
