from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx_lm.models import llama
from mlx_lm.models.cache import ChunkedKVCache

from mlx_port import tree_forward
from mlx_port.target import Target
from mlx_port.tree_forward import Mode
from tests.mlx_port.tiny_models import (
    CONFIGS,
    PROMPT,
    SIZES,
    VOCAB,
    alone,
    drafted,
    make_drafter,
    make_model,
    make_plan,
)

AFM7 = {
    "model_type": "afm7",
    "vocab_size": VOCAB,
    "hidden_dim": 64,
    "num_layers": 3,
    "num_kv_reuse_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
}
DYNAMIC = {**SIZES, "model_type": "internlm2", "bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}}


@pytest.mark.parametrize(("name", "mode"), [("llama", Mode.TREE), ("gemma3", Mode.TREE), ("gpt2", Mode.ROWS)])
def test_the_test_at_load_finds_how_a_model_takes_a_tree(name: str, mode: Mode) -> None:
    assert Target(make_model(CONFIGS[name])).mode is mode


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [None, 4])
def test_rounding_does_not_fail_the_test_at_load(dtype: mx.Dtype, bits: int | None) -> None:
    target = Target(make_model(CONFIGS["llama"], dtype, bits))

    assert target.mode is Mode.TREE
    assert target.dtype == dtype


def test_a_model_that_gets_trees_silently_wrong_decodes_chains(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        target = Target(make_model(AFM7))

    assert target.mode is Mode.CHAIN
    assert "afm7 decodes chains only, as mode 'tree' fails its test at load" in caplog.text
    token_ids, telemetry = drafted(target, PROMPT, 40)
    assert token_ids == alone(target, PROMPT, 40)
    assert telemetry.accepted_draft_token_count > 0
    assert telemetry.draft_token_count == 4 * telemetry.round_count


def test_a_wide_plan_is_refused_where_only_chains_are_decoded() -> None:
    target = Target(make_model(AFM7))

    with pytest.raises(ValueError, match="the beam width is 2, but the afm7 target decodes chains only: make it 1"):
        drafted(target, PROMPT, 4, plan=make_plan(2, 2, 4))


def test_a_rope_that_takes_no_array_of_offsets_decodes_chains(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        target = Target(make_model(DYNAMIC))

    assert target.mode is Mode.CHAIN
    assert "internlm2 decodes chains only, as mode 'tree' fails its test at load" in caplog.text
    assert drafted(target, PROMPT, 40)[0] == alone(target, PROMPT, 40)


@pytest.mark.parametrize("max_kv_size", [8, 13, 30])
def test_chains_are_read_as_single_tokens_are_where_a_rotating_cache_wraps(max_kv_size: int) -> None:
    target = Target(make_model(DYNAMIC))

    token_ids, telemetry = drafted(target, PROMPT, 60, plan=make_plan(1, 3, 3), max_kv_size=max_kv_size)

    assert token_ids == alone(target, PROMPT, 60, max_kv_size=max_kv_size)
    assert telemetry.accepted_draft_token_count > 0


@pytest.mark.parametrize("broken", ["positions", "mask"])
def test_the_test_at_load_sees(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIGS["llama"])
    if broken == "positions":
        monkeypatch.setattr(tree_forward.Layout, "positions", property(_as_text, lambda *_: None), raising=False)
    else:
        monkeypatch.setattr(tree_forward.Layout, "mask", _causal)

    assert Target(model).mode is Mode.CHAIN


def _as_text(layout: Any) -> mx.array:
    return layout.num_cached + mx.arange(len(layout._ancestors))


def _causal(layout: Any, *_: Any) -> mx.array:
    size = len(layout._ancestors)
    return mx.tril(mx.ones((size, layout.num_cached + size), mx.bool_), layout.num_cached)


def test_a_model_whose_cache_cannot_forget_is_refused() -> None:
    class Chunked(llama.Model):
        def make_cache(self) -> list[Any]:
            return [ChunkedKVCache(8) for _ in self.layers]

    model = make_model(CONFIGS["llama"])
    model.__class__ = Chunked

    with pytest.raises(NotImplementedError, match="it keeps ChunkedKVCache, which cannot forget rejected"):
        Target(model)


def test_a_model_without_a_token_embedding_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))

    with pytest.raises(NotImplementedError, match="its token embedding was not found"):
        Target(model)


def test_a_drafter_of_another_target_is_refused() -> None:
    target = Target(make_model(CONFIGS["llama"]))

    with pytest.raises(
        ValueError,
        match="does not fit this llama target: it has hidden_size 32 where the target has 64 and "
        "vocab_size 12 where the target has 11; pass a drafter",
    ):
        target.lend(make_drafter(hidden_size=32, vocab_size=12))


@pytest.mark.parametrize("name", ["llama", "llama, untied", "gpt_neox"])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_tied_head_is_the_targets_own(name: str, bits: int | None) -> None:
    target = Target(make_model(CONFIGS[name], bits=bits))
    whole, part = (make_drafter(tie_lm_head=True, exit_dim=64, draft_vocab_size=size) for size in (None, 3))
    part.set_draft_vocabulary(mx.array([2, 3, 7]))
    part.update(whole.parameters())
    target.lend(whole)
    target.lend(part)

    state = whole.advance(whole.start(mx.ones(64)), target.embed(mx.array([1])))

    assert mx.array_equal(part.logits(state), whole.logits(state)[..., mx.array([2, 3, 7])])
    assert drafted(target, PROMPT, 20, drafter=whole)[0] == alone(target, PROMPT, 20)


def test_a_model_keeps_its_classes_and_mlx_its_rope() -> None:
    model = make_model(CONFIGS["llama"])
    kinds, rope = [type(module) for module in model.modules()], mx.fast.rope
    target = Target(model)

    drafted(target, PROMPT, 10, plan=make_plan(3, 3, 9))

    assert [type(module) for module in model.modules()] == kinds
    assert mx.fast.rope is rope
