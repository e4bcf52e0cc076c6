"""The configuration refuses what no drafter can be built from, and writes what vLLM's own reader accepts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from vllm_redrafter.core.config import MAX_NODES, ReDrafterConfig, check_num_nodes


def make_config(**changes: Any) -> ReDrafterConfig:
    return ReDrafterConfig(**({"hidden_size": 8, "vocab_size": 32} | changes))


def test_what_is_left_out_follows_from_the_hidden_size() -> None:
    config = make_config()
    config.check()
    assert config.exit_dim == 16
    assert not config.has_input_proj
    assert config.head_size == 32
    assert config.trained_draft_length == config.draft_length == 4


def test_an_input_projection_is_there_when_the_exit_width_is_not_twice_the_hidden_size() -> None:
    assert make_config(exit_dim=12).has_input_proj


def test_a_draft_vocabulary_sets_the_size_of_the_head() -> None:
    assert make_config(draft_vocab_size=5).head_size == 5


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "exit_dim", "beam_width", "draft_length"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8"])
def test_a_size_must_be_a_positive_integer(name: str, value: object) -> None:
    config = make_config()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=rf"{name} is {value!r}, but it must be a positive integer"):
        config.check()


@pytest.mark.parametrize("value", [0, -3])
def test_the_trained_draft_length_must_be_positive(value: int) -> None:
    with pytest.raises(ValueError, match=f"trained_draft_length is {value}, but it must be a positive integer"):
        make_config(trained_draft_length=value).check()


@pytest.mark.parametrize("value", [-1, 1.5])
def test_the_number_of_layers_must_not_be_negative(value: float) -> None:
    with pytest.raises(ValueError, match=rf"num_draft_layers is {value}, but it must be an integer of 0 or more"):
        make_config(num_draft_layers=value).check()


@pytest.mark.parametrize("value", [0, 33, "8"])
def test_a_draft_vocabulary_lies_between_1_and_the_targets(value: object) -> None:
    with pytest.raises(ValueError, match=r"draft_vocab_size is .*, but it must .*between 1 and vocab_size \(32\)"):
        make_config(draft_vocab_size=value).check()


def test_a_tied_head_needs_the_targets_hidden_size() -> None:
    make_config(tie_lm_head=True, exit_dim=8).check()
    with pytest.raises(ValueError, match=r"exit_dim is 16, but a head tied .* exit_dim == hidden_size \(8\)"):
        make_config(tie_lm_head=True).check()


@pytest.mark.parametrize("value", [0, -5, "50"])
def test_top_k_is_positive_or_absent(value: object) -> None:
    make_config(top_k=None).check()
    with pytest.raises(ValueError, match=r"top_k is .*, but it must be .*positive.*null to keep all"):
        make_config(top_k=value).check()


def test_fused_layers_widen_what_the_target_hands_over() -> None:
    assert make_config().input_size == 8
    assert make_config(fused_layers=[0, 2, 9]).input_size == 4 * 8


@pytest.mark.parametrize("value", [[], [2, 2], [3, 1], [-1, 2], [True, 2], [1.0], ["1"]])
def test_fused_layers_are_distinct_ascending_and_not_negative(value: list[object]) -> None:
    make_config(fused_layers=[0, 7]).check()
    with pytest.raises(
        ValueError, match=rf"fused_layers is {re.escape(repr(value))}, but it must hold distinct .*null"
    ):
        make_config(fused_layers=value).check()


@pytest.mark.parametrize("value", [0, MAX_NODES + 1, True, 8.0])
def test_the_tree_size_lies_between_1_and_63(value: int) -> None:
    with pytest.raises(ValueError, match="must lie between 1 and 63"):
        check_num_nodes(value)
    with pytest.raises(ValueError, match=rf"num_speculative_tokens is {value!r}"):
        make_config(num_speculative_tokens=value).check()


def test_the_smallest_and_the_largest_tree_are_allowed() -> None:
    check_num_nodes(1)
    check_num_nodes(MAX_NODES)


def test_the_written_fields_rebuild_the_same_configuration() -> None:
    config = make_config(
        exit_dim=12,
        rnn=False,
        top_k=7,
        fused_layers=[0, 3],
        verifier="org/target",
        verifier_architectures=["LlamaForCausalLM"],
    )
    assert ReDrafterConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_vllms_own_speculators_reader_accepts_the_written_fields() -> None:
    base = pytest.importorskip("vllm.transformers_utils.configs.speculators.base")
    fields = make_config(verifier="org/target", num_speculative_tokens=11).to_dict()
    assert base.SpeculatorsConfig.extract_vllm_speculative_config(fields) == {
        "method": "redrafter",
        "num_speculative_tokens": 11,
    }
    assert fields["transformer_layer_config"] == {"hidden_size": 8, "vocab_size": 32}
    assert fields["speculators_config"]["verifier"]["name_or_path"] == "org/target"
