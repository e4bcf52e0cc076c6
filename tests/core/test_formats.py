"""Every dialect of `config.json` and of tensor names means the same drafter; everything else is refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from vllm_redrafter.core import formats
from vllm_redrafter.core.config import ReDrafterConfig

APPLE = {
    "model_type": "recurrent_drafting_drafter",
    "architectures": ["Drafter"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "exit_dim": 8192,
    "num_draft_layers": 2,
    "rnn": True,
    "num_lookback_tokens": -1,
    "torch_dtype": "float32",
    "transformers_version": "4.40.0",
}
TENSORRT_LLM = {
    "architecture": "ReDrafterForLLaMALM",
    "vocab_size": 32000,
    "redrafter_num_beams": 5,
    "redrafter_draft_len_per_beam": 3,
    "redrafter_num_layers": 1,
    "redrafter_hidden_size": 64,
    "redrafter_exit_dim": 96,
    "redrafter_is_rnn": True,
}
EPLATERO = {
    "speculators_model_type": "recurrent_drafting",
    "architectures": ["RecurrentDraftingSpeculator"],
    "hidden_size": 768,
    "vocab_size": 50257,
    "exit_dim": 768,
    "num_draft_layers": 2,
    "rnn": True,
    "emb_norm": True,
    "rms_norm_eps": 1e-5,
    "speculators_config": {
        "algorithm": "recurrent_drafting",
        "default_proposal_method": "beam_search_recurrent",
        "proposal_methods": [
            {"proposal_type": "beam_search_recurrent", "beam_width": 6, "beam_length": 5, "top_k": 20}
        ],
        "verifier": {"name_or_path": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    },
}


def ours(**changes: Any) -> dict[str, Any]:
    return ReDrafterConfig(hidden_size=8, vocab_size=32).to_dict() | changes


def parse(fields: dict[str, Any]) -> ReDrafterConfig:
    return formats.parse_config(fields, "some/drafter")


@pytest.mark.parametrize(
    ("fields", "dialect"),
    [
        (ReDrafterConfig(hidden_size=8, vocab_size=32).to_dict(), "redrafter"),
        (APPLE, "apple"),
        (TENSORRT_LLM, "trtllm"),
        (APPLE | {"redrafter_num_beams": 8}, "trtllm"),
        (EPLATERO, "eplatero"),
        ({"model_type": "llama"}, None),
        ({}, None),
    ],
)
def test_a_config_tells_its_dialect(fields: dict[str, Any], dialect: str | None) -> None:
    assert formats.dialect_of(fields) == dialect
    assert dialect is None or dialect in formats.DIALECTS


def test_our_own_fields_come_back_as_they_were() -> None:
    config = ReDrafterConfig(
        hidden_size=8, vocab_size=32, exit_dim=9, beam_width=3, draft_length=5, verifier="org/target"
    )
    assert parse(config.to_dict()).to_dict() == config.to_dict()


def test_the_type_table_covers_every_field_of_the_configuration() -> None:
    parameters = set(inspect.signature(ReDrafterConfig.__init__).parameters) - {"self", "kwargs"}
    assert set(formats._FIELD_TYPES) == parameters


def test_either_of_the_two_type_keys_marks_our_own_format() -> None:
    for name in ("model_type", "speculators_model_type"):
        fields = {"hidden_size": 8, "vocab_size": 32, "exit_dim": 16, "num_draft_layers": 1, name: "redrafter"}
        assert parse(fields).num_draft_layers == 1


def test_what_only_the_speculators_blocks_say_is_taken_from_them() -> None:
    fields = ours(num_speculative_tokens=21, verifier="org/target", verifier_architectures=["LlamaForCausalLM"])
    fields = ReDrafterConfig(**fields).to_dict()
    for name in ("hidden_size", "vocab_size", "num_speculative_tokens", "verifier", "verifier_architectures"):
        del fields[name]
    config = parse(fields)
    assert (config.hidden_size, config.vocab_size, config.num_speculative_tokens) == (8, 32, 21)
    assert (config.verifier, config.verifier_architectures) == ("org/target", ["LlamaForCausalLM"])


def test_a_flat_field_that_contradicts_its_speculators_block_is_refused() -> None:
    nested = r"num_speculative_tokens is 9, but speculators_config.proposal_methods\[0\].speculative_tokens is 8"
    with pytest.raises(ValueError, match=nested):
        parse(ours(num_speculative_tokens=9))
    with pytest.raises(ValueError, match=r"vocab_size is 33, but transformer_layer_config.vocab_size is 32: make them"):
        parse(ours(vocab_size=33))


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match=r"'some/drafter' has keys .* 'beam_widht' \(did you mean 'beam_width'\?\)"):
        parse(ours(beam_widht=3))


def test_an_unknown_key_that_resembles_none_is_refused_and_all_are_named() -> None:
    with pytest.raises(ValueError, match=r"'zzz' \(remove it\), 'draft_len' \(did you mean 'draft_length'\?\)"):
        parse(ours(zzz=1, draft_len=3))


def test_keys_that_transformers_writes_are_known() -> None:
    parse(ours(torch_dtype="float32", dtype="float32", _name_or_path="x", architectures=["ReDrafter"]))


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("hidden_size", 8.0, "an integer"),
        ("hidden_size", None, "an integer"),
        ("beam_width", True, "an integer"),
        ("rnn", "yes", "true or false"),
        ("tie_lm_head", 0, "true or false"),
        ("top_k", "50", "an integer or null"),
        ("verifier", 3, "a string or null"),
        ("verifier_architectures", "LlamaForCausalLM", "a list or null"),
    ],
)
def test_a_field_of_another_type_is_refused(name: str, value: object, rule: str) -> None:
    fields = ours() | {name: value}
    del fields["speculators_config"], fields["transformer_layer_config"]
    with pytest.raises(
        ValueError, match=rf"config.json of 'some/drafter': {name} is {value!r}, but it must be {rule}$"
    ):
        parse(fields)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "exit_dim", "num_draft_layers"])
def test_a_missing_size_is_named(name: str) -> None:
    fields = {key: value for key, value in APPLE.items() if key != name}
    with pytest.raises(ValueError, match=f"config.json of 'some/drafter' lacks '{name}': add it"):
        parse(fields)


def test_a_size_that_no_drafter_can_have_is_refused_with_the_place() -> None:
    with pytest.raises(ValueError, match=r"config.json of 'some/drafter': .*exit_dim is -1, but it must be a positive"):
        parse(APPLE | {"exit_dim": -1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speculators_config": []}, r"speculators_config is \[\], but it must be an object"),
        (
            {"speculators_config": {"proposal_methods": {"a": 1}}},
            r"proposal_methods is \{'a': 1\}, but it must be a list",
        ),
        (
            {"speculators_config": {"proposal_methods": [3]}},
            r"proposal_methods is \[3\], but it must be a list of objects",
        ),
        ({"transformer_layer_config": "llama"}, "transformer_layer_config is 'llama', but it must be an object"),
    ],
)
def test_a_malformed_speculators_block_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(ours(**fields))


def test_apples_config_drafts_as_apples_code_does() -> None:
    config = parse(APPLE)
    assert (config.hidden_size, config.vocab_size, config.exit_dim, config.num_draft_layers) == (4096, 32000, 8192, 2)
    assert config.rnn
    assert not config.has_input_proj
    assert config.top_k == 50
    assert (config.beam_width, config.draft_length, config.trained_draft_length) == (4, 4, 5)


def test_apples_drafter_has_no_rnn_unless_it_says_so() -> None:
    assert not parse({name: value for name, value in APPLE.items() if name != "rnn"}).rnn


def test_apples_exit_dim_decides_about_the_input_projection() -> None:
    config = parse(APPLE | {"exit_dim": 4096, "emb_norm": True, "rms_norm_eps": 1e-5})
    assert config.has_input_proj
    assert config.emb_norm


def test_tensorrt_llms_spellings_are_understood() -> None:
    config = parse(TENSORRT_LLM)
    assert (config.hidden_size, config.vocab_size, config.exit_dim, config.num_draft_layers) == (64, 32000, 96, 1)
    assert config.rnn
    # draft_len_per_beam does not count the token that the target guarantees
    assert (config.beam_width, config.draft_length, config.trained_draft_length) == (5, 3, 5)
    assert config.top_k == 50


def test_tensorrt_llms_beam_shape_may_stand_in_apples_config() -> None:
    config = parse(APPLE | {"redrafter_num_beams": 8, "redrafter_draft_len_per_beam": 2})
    assert (config.beam_width, config.draft_length, config.hidden_size) == (8, 2, 4096)


def test_the_eplatero_forks_beam_length_counts_the_init_token() -> None:
    config = parse(EPLATERO)
    assert (config.beam_width, config.draft_length, config.top_k) == (6, 4, 20)
    assert (config.hidden_size, config.vocab_size, config.exit_dim, config.num_draft_layers) == (768, 50257, 768, 2)
    assert config.rnn
    assert config.emb_norm
    assert (config.verifier, config.verifier_architectures) == ("gpt2", ["GPT2LMHeadModel"])


def test_the_eplatero_forks_defaults_fill_an_absent_proposal() -> None:
    config = parse({name: value for name, value in EPLATERO.items() if name != "speculators_config"})
    assert (config.beam_width, config.draft_length, config.top_k) == (10, 3, 50)


@pytest.mark.parametrize("beam_length", [1, "4", None])
def test_a_beam_length_without_a_drafted_token_is_refused(beam_length: object) -> None:
    proposal = {"beam_width": 2, "beam_length": beam_length}
    fields = EPLATERO | {"speculators_config": {"proposal_methods": [proposal]}}
    with pytest.raises(ValueError, match=rf"beam_length is {beam_length!r}, but it counts the init token"):
        parse(fields)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "a llama"),
        ({"model_type": "eagle", "model": {"model_type": "llama"}}, "an eagle"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}, "an eagle"),
        ({"model_type": "medusa", "num_heads": 3}, "a medusa"),
        ({"medusa_num_heads": 3, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}, "a medusa"),
        ({"speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"]}, "an eagle3"),
        ({"model_type": "mlp_speculator"}, "a mlp_speculator"),
        ({"model_type": "redrafter", "speculators_model_type": "eagle3"}, "an eagle3"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(fields: dict[str, Any], kind: str) -> None:
    message = f"'some/drafter' is {kind} model, not a ReDrafter drafter: pass the drafter's directory as \"model\" in "
    with pytest.raises(ValueError, match=message):
        parse(fields)


def test_a_config_without_a_type_says_how_to_mark_it_as_apples() -> None:
    fields = {name: value for name, value in APPLE.items() if name != "model_type"}
    with pytest.raises(
        ValueError, match=r'has no model_type: .* write "model_type": "recurrent_drafting_drafter" into it'
    ):
        parse(fields)


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        ("lm_head.0.linear.weight", "lm_head.0.linear.weight"),
        ("rnn_u.bias", "rnn_u.bias"),
        ("input_proj.weight", "input_proj.weight"),
        ("input_projs.weight", "input_proj.weight"),
        ("input_projs.0.bias", "input_proj.bias"),
        ("lm_heads.1.linear.bias", "lm_head.1.linear.bias"),
        ("lm_heads.2.weight", "lm_head.2.weight"),
        ("0.1.linear.weight", "lm_head.1.linear.weight"),
        ("0.2.weight", "lm_head.2.weight"),
        ("emb_norm.weight", None),
        ("1.2.weight", "1.2.weight"),
        ("model.lm_heads.2.weight", "model.lm_heads.2.weight"),
    ],
)
def test_older_tensor_names_are_mapped_and_others_are_kept(stored: str, ours: str | None) -> None:
    assert formats.tensor_name(stored) == ours
