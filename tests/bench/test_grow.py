"""Growing changes what a model costs, and nothing of what it computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from vllm_redrafter.bench.grow import TargetShape, grow_drafter, grow_target
from vllm_redrafter.core import checkpoint
from vllm_redrafter.core.beam_search import BeamShape, Candidates, search
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "models" / "stories3M"
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
TARGETS = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied, with biases": LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "mistral with a sliding window": MistralConfig(**SIZES, sliding_window=5),
}
DRAFTERS = {
    "own head, no projection": {"exit_dim": 48},
    "own head, projected": {"exit_dim": 20},
    "tied head": {"exit_dim": 24, "tie_lm_head": True},
    "sum of embeddings": {"exit_dim": 48, "rnn": False},
    "draft vocabulary": {"exit_dim": 48, "draft_vocab_size": 7},
}


def make_target(directory: Path, config: PreTrainedConfig) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            # the norms and biases that a fresh model has would hide a wrong scale
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(directory)


def make_drafter(directory: Path, fields: dict[str, int | bool]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drafter = ReDrafter(ReDrafterConfig(hidden_size=24, vocab_size=40, **fields))
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.mul_(3)
    if drafter.config.draft_vocab_size is not None:
        drafter.set_draft_vocabulary(torch.tensor([1, 4, 9, 16, 25, 36, 39]))
    checkpoint.save_drafter(drafter, directory)


def logits_and_hidden(
    directory: Path, input_ids: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.no_grad():
        output = model(input_ids, output_hidden_states=True)
    return output.logits, output.hidden_states[-1]


def draft(directory: Path, target: Path, hidden: torch.Tensor) -> Candidates:
    drafter = checkpoint.load_drafter(directory)
    model = AutoModelForCausalLM.from_pretrained(target)
    if drafter.config.tie_lm_head:
        drafter.tie_head(model.get_output_embeddings().weight)
    with torch.no_grad():
        return search(drafter, model.get_input_embeddings(), hidden, torch.tensor([3, 5, 7]), BeamShape(3, 4), 6)


def random_ids(vocab_size: int, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("factor", [1, 3, 4])
@pytest.mark.parametrize("kind", TARGETS)
def test_a_grown_target_computes_what_the_small_one_does(kind: str, factor: int, tmp_path: Path) -> None:
    make_target(tmp_path / "small", TARGETS[kind])
    input_ids = random_ids(40, (3, 16))

    grow_target(tmp_path / "small", tmp_path / "large", TargetShape(factor))

    logits, hidden = logits_and_hidden(tmp_path / "small", input_ids)
    grown_logits, grown_hidden = logits_and_hidden(tmp_path / "large", input_ids)
    # the order of summation differs, and a square root that is no power of two rounds
    torch.testing.assert_close(grown_logits, logits, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(grown_hidden[..., :24], hidden, atol=1e-4, rtol=1e-5)
    assert grown_hidden.shape[-1] == factor * 24
    assert not grown_hidden[..., 24:].any()


@pytest.mark.parametrize("head_size", [16, 24, 32])
@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("kind", TARGETS)
def test_larger_heads_compute_what_the_small_ones_do(kind: str, factor: int, head_size: int, tmp_path: Path) -> None:
    make_target(tmp_path / "small", TARGETS[kind])
    input_ids = random_ids(40, (3, 48))

    grow_target(tmp_path / "small", tmp_path / "large", TargetShape(factor, head_size=head_size))

    logits, _ = logits_and_hidden(tmp_path / "small", input_ids)
    grown_logits, _ = logits_and_hidden(tmp_path / "large", input_ids)
    # the order of summation differs, and a square root that is no power of two rounds
    torch.testing.assert_close(grown_logits, logits, atol=1e-4, rtol=1e-5)
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "large")
    attention = grown.model.layers[0].self_attn
    assert attention.head_dim == head_size
    assert attention.q_proj.weight.shape == (factor * 6 * head_size, factor * 24)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (factor * 2 * head_size, factor * 24)
    assert attention.o_proj.weight.shape == (factor * 24, factor * 6 * head_size)


def test_heads_four_times_as_large_round_nothing(tmp_path: Path) -> None:
    make_target(tmp_path / "small", TARGETS["untied, with biases"])
    input_ids = random_ids(40, (3, 48))

    grow_target(tmp_path / "small", tmp_path / "large", TargetShape(4, head_size=32))

    logits, _ = logits_and_hidden(tmp_path / "small", input_ids, torch.float64)
    grown_logits, _ = logits_and_hidden(tmp_path / "large", input_ids, torch.float64)
    # the order of summation differs: all that is left in float64, where weights rounded to float32 would show
    torch.testing.assert_close(grown_logits, logits, atol=1e-11, rtol=1e-11)


def test_a_grown_target_admits_more_positions(tmp_path: Path) -> None:
    make_target(tmp_path / "small", TARGETS["tied"])
    input_ids = random_ids(40, (1, 100))

    grow_target(tmp_path / "small", tmp_path / "large", TargetShape(1, head_size=32, num_positions=200))

    logits, _ = logits_and_hidden(tmp_path / "small", input_ids)
    grown_logits, _ = logits_and_hidden(tmp_path / "large", input_ids)
    # the order of summation differs
    torch.testing.assert_close(grown_logits, logits, atol=1e-4, rtol=1e-5)
    assert AutoConfig.from_pretrained(tmp_path / "large").max_position_embeddings == 200


def test_a_grown_target_has_the_shape_asked_for(tmp_path: Path) -> None:
    make_target(tmp_path / "small", TARGETS["tied"])

    num_parameters = grow_target(tmp_path / "small", tmp_path / "large", TargetShape(3, 5, 12, 4, 50))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "large")
    assert model.config.hidden_size == 72
    assert model.config.head_dim == 8
    assert model.config.max_position_embeddings == 64
    assert len(model.model.layers) == 5
    assert model.model.layers[4].self_attn.q_proj.weight.shape == (12 * 8, 72)
    assert model.model.layers[4].self_attn.k_proj.weight.shape == (4 * 8, 72)
    assert model.model.layers[4].mlp.down_proj.weight.shape == (72, 50)
    assert num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("keep_exit", [False, True])
@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_grown_drafter_drafts_for_the_grown_target_what_the_small_one_does(
    kind: str, factor: int, keep_exit: bool, tmp_path: Path
) -> None:
    make_target(tmp_path / "small", TARGETS["tied"])
    make_drafter(tmp_path / "drafter", DRAFTERS[kind])
    _, hidden = logits_and_hidden(tmp_path / "small", random_ids(40, (3, 5)))

    grow_target(tmp_path / "small", tmp_path / "large", TargetShape(factor))
    grow_drafter(tmp_path / "drafter", tmp_path / "large_drafter", factor, keep_exit=keep_exit)

    hidden = hidden[:, -1]
    drafts = draft(tmp_path / "drafter", tmp_path / "small", hidden)
    padded = torch.nn.functional.pad(hidden, (0, (factor - 1) * 24))
    grown_drafts = draft(tmp_path / "large_drafter", tmp_path / "large", padded)
    assert torch.equal(grown_drafts.token_ids, drafts.token_ids)
    assert torch.equal(grown_drafts.parents, drafts.parents)
    # the order of summation differs
    torch.testing.assert_close(grown_drafts.log_probs, drafts.log_probs, atol=1e-4, rtol=1e-5)


def test_blocks_and_head_keep_their_width_if_asked_for(tmp_path: Path) -> None:
    make_drafter(tmp_path / "small", DRAFTERS["own head, no projection"])

    grow_drafter(tmp_path / "small", tmp_path / "wide", 4)
    num_parameters = grow_drafter(tmp_path / "small", tmp_path / "kept", 4, keep_exit=True)

    wide, kept = (checkpoint.load_drafter(tmp_path / name) for name in ("wide", "kept"))
    assert (wide.config.exit_dim, wide.config.has_input_proj) == (192, False)
    assert (kept.config.exit_dim, kept.config.has_input_proj) == (48, True)
    assert kept.input_proj.weight.shape == (48, 192)
    assert num_parameters == sum(parameter.numel() for parameter in kept.parameters())


def test_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    make_target(tmp_path / "small", TARGETS["tied"])
    make_drafter(tmp_path / "drafter", DRAFTERS["tied head"])
    for path in ("small/tokenizer.json", "small/tokenizer_config.json", "drafter/tokenizer.json"):
        (tmp_path / path).write_text(path)
    (tmp_path / "small" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')

    grow_target(tmp_path / "small", tmp_path / "large", TargetShape(2))
    grow_drafter(tmp_path / "drafter", tmp_path / "large_drafter", 2)

    assert (tmp_path / "large" / "tokenizer.json").read_text() == "small/tokenizer.json"
    assert (tmp_path / "large" / "tokenizer_config.json").read_text() == "small/tokenizer_config.json"
    assert (tmp_path / "large" / "generation_config.json").read_text() == '{"eos_token_id": [1, 2]}'
    assert (tmp_path / "large_drafter" / "tokenizer.json").read_text() == "drafter/tokenizer.json"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories model is not there: ../shared/data")
def test_the_stories_model_grows_to_79m_parameters_and_keeps_its_logits(tmp_path: Path) -> None:
    input_ids = random_ids(4096, (1, 48))

    num_parameters = grow_target(STORIES, tmp_path / "large", TargetShape(4, 12, 24, 8, 2048))

    # every machine sums wider rows in an order of its own: in float64 that is far below any mistake
    logits, _ = logits_and_hidden(STORIES, input_ids, torch.float64)
    grown_logits, _ = logits_and_hidden(tmp_path / "large", input_ids, torch.float64)
    assert num_parameters == 78_662_400
    torch.testing.assert_close(grown_logits, logits, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"factor": 0}, "factor is 0, but a model can only grow: it must be at least 1"),
        ({"factor": -2}, "factor is -2, but a model can only grow: it must be at least 1"),
        ({"factor": 2, "num_layers": 1}, "num_hidden_layers is 1, but the model has 2 and can only grow"),
        ({"factor": 2, "num_heads": 3, "num_kv_heads": 1}, "num_attention_heads is 3, but the model has 6"),
        ({"factor": 2, "intermediate_size": 8}, "intermediate_size is 8, but the model has 32"),
        ({"factor": 2, "num_heads": 9, "num_kv_heads": 3}, "9 heads do not divide the grown hidden size of 48"),
        (
            {"factor": 2, "num_heads": 8, "num_kv_heads": 4},
            "8 heads over 4 KV heads is not the model's own ratio of 6 to 2: keep 3 heads per KV head",
        ),
        (
            {"factor": 2, "num_heads": 12, "num_kv_heads": 2},
            "12 heads over 2 KV heads is not the model's own ratio of 6 to 2: keep 3 heads per KV head",
        ),
        ({"factor": 2, "head_size": 4}, "head_dim is 4, but the model has 8 and can only grow: ask for more"),
        (
            {"factor": 2, "head_size": 20},
            "head_dim is 20, but the model has 8 and heads grow by whole multiples: ask for 24",
        ),
        ({"factor": 2, "num_positions": 63}, "max_position_embeddings is 63, but the model has 64 and can only grow"),
    ],
)
def test_a_shape_that_cannot_hold_the_model_is_refused(arguments: dict[str, int], reason: str, tmp_path: Path) -> None:
    make_target(tmp_path / "small", TARGETS["tied"])

    with pytest.raises(ValueError, match=re.escape(reason)):
        grow_target(tmp_path / "small", tmp_path / "large", TargetShape(**arguments))
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize(
    ("rope", "size", "reason"),
    [
        ({"rope_type": "linear", "factor": 2.0}, {"head_size": 32}, "rope_type is 'linear', .* head_dim, .*: keep 8"),
        (
            {"rope_type": "dynamic", "factor": 2.0},
            {"num_positions": 128},
            "rope_type is 'dynamic', .* max_position_embeddings, .*: keep 64",
        ),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            {"head_size": 32},
            r"partial_rotary_factor is 0\.5, .*: keep 8",
        ),
    ],
)
def test_what_another_rotary_embedding_depends_on_does_not_grow(
    rope: dict[str, float | str], size: dict[str, int], reason: str, tmp_path: Path
) -> None:
    make_target(tmp_path / "small", LlamaConfig(**SIZES, rope_parameters={"rope_theta": 10000.0, **rope}))

    with pytest.raises(ValueError, match=f"the model's {reason}"):
        grow_target(tmp_path / "small", tmp_path / "large", TargetShape(2, **size))
    grow_target(tmp_path / "small", tmp_path / "large", TargetShape(2))
    assert AutoConfig.from_pretrained(tmp_path / "large").head_dim == 8


def test_models_that_are_not_llama_like_are_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10)).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="is a gpt2 model, but only llama and mistral models can be grown"):
        grow_target(tmp_path, tmp_path / "large", TargetShape(2))


def test_a_drafter_in_the_place_of_a_target_is_refused(tmp_path: Path) -> None:
    checkpoint.save_drafter(ReDrafter(ReDrafterConfig(hidden_size=8, vocab_size=16)), tmp_path)

    with pytest.raises(ValueError, match="is a redrafter model, but only llama and mistral models can be grown"):
        grow_target(tmp_path, tmp_path / "large", TargetShape(2))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json in .*: pass a directory that holds a target"):
        grow_target(tmp_path, tmp_path / "large", TargetShape(2))


def test_a_drafter_whose_projection_would_vanish_is_refused(tmp_path: Path) -> None:
    make_drafter(tmp_path, {"exit_dim": 96})

    with pytest.raises(ValueError, match="factor 2 would make the drafter's exit_dim, 96, twice the hidden size"):
        grow_drafter(tmp_path, tmp_path / "large", 2)


def test_a_drafter_with_fused_layers_is_refused(tmp_path: Path) -> None:
    checkpoint.save_drafter(ReDrafter(ReDrafterConfig(24, 40, fused_layers=[1])), tmp_path)

    with pytest.raises(ValueError, match=r"the drafter fuses the layers \[1\], .*: grow one without fused_layers"):
        grow_drafter(tmp_path, tmp_path / "large", 2)


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    make_target(tmp_path / "small", TARGETS["tied"])
    make_drafter(tmp_path / "drafter", DRAFTERS["tied head"])

    with pytest.raises(ValueError, match="is the source: pass another directory"):
        grow_target(tmp_path / "small", tmp_path / "drafter" / ".." / "small", TargetShape(2))
    with pytest.raises(ValueError, match="is the source: pass another directory"):
        grow_drafter(tmp_path / "drafter", tmp_path / "drafter", 2)
