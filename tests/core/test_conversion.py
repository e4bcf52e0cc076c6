"""A drafter changes its format and nothing else; what a format cannot hold is refused with the way out."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_redrafter.core import checkpoint
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.conversion import convert
from vllm_redrafter.core.drafter import ReDrafter

APPLE = {
    "model_type": "recurrent_drafting_drafter",
    "architectures": ["Drafter"],
    "hidden_size": 4,
    "vocab_size": 60,
    "exit_dim": 8,
    "num_draft_layers": 2,
    "rnn": True,
    "torch_dtype": "bfloat16",
}


def random_state(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> dict[str, torch.Tensor]:
    """Returns the tensors of a drafter under Apple's names."""
    drafter = ReDrafter(ReDrafterConfig(**({"hidden_size": 4, "vocab_size": 60, "exit_dim": 8} | changes)))
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in drafter.state_dict().items()
    }


def store(directory: Path, fields: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def assert_same_bits(directory: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(directory / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def read_config(directory: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return fields


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A drafter of our own that Apple's format can hold."""
    drafter = ReDrafter(ReDrafterConfig(hidden_size=4, vocab_size=60, exit_dim=6, top_k=50, verifier="org/target"))
    checkpoint.save_drafter(drafter, tmp_path / "ours")
    return tmp_path / "ours"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("exit_dim", [8, 5])
def test_apples_drafter_becomes_ours_and_apples_again_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, exit_dim: int
) -> None:
    state = random_state(dtype, exit_dim=exit_dim)
    fields = APPLE | {"exit_dim": exit_dim, "torch_dtype": str(dtype).removeprefix("torch.")}
    apple = store(tmp_path / "apple", fields, state)

    convert(apple, tmp_path / "ours", source_format="apple")
    convert(tmp_path / "ours", tmp_path / "again", target_format="apple")

    assert_same_bits(tmp_path / "ours", state)
    assert_same_bits(tmp_path / "again", state)
    assert read_config(tmp_path / "again") == fields
    assert read_config(tmp_path / "ours")["top_k"] == 50


def test_the_norm_that_nobody_applies_comes_along(tmp_path: Path) -> None:
    state = random_state() | {"emb_norm.weight": torch.full((4,), 7.0, dtype=torch.bfloat16)}
    apple = store(tmp_path / "apple", APPLE | {"emb_norm": True, "rms_norm_eps": 1e-5}, state)

    convert(apple, tmp_path / "ours", source_format="apple")
    convert(tmp_path / "ours", tmp_path / "again", target_format="apple")

    assert_same_bits(tmp_path / "ours", state)
    assert_same_bits(tmp_path / "again", state)
    assert read_config(tmp_path / "again")["emb_norm"] is True


def test_a_norm_that_is_announced_and_not_there_is_not_announced_again(tmp_path: Path) -> None:
    apple = store(tmp_path / "apple", APPLE | {"emb_norm": True}, random_state())

    convert(apple, tmp_path / "ours", source_format="apple")
    convert(tmp_path / "ours", tmp_path / "again", target_format="apple")

    assert "emb_norm" not in read_config(tmp_path / "again")


def test_our_drafter_survives_the_way_over_apples_format_bit_for_bit(ours: Path, tmp_path: Path) -> None:
    convert(ours, tmp_path / "apple", target_format="apple")
    convert(tmp_path / "apple", tmp_path / "again", source_format="apple", verifier="org/target")

    assert_same_bits(tmp_path / "again", load_file(ours / "model.safetensors"))
    kept = ("hidden_size", "vocab_size", "exit_dim", "num_draft_layers", "rnn", "top_k", "verifier")
    before, after = read_config(ours), read_config(tmp_path / "again")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_tensorrt_llms_spellings_become_ours(tmp_path: Path) -> None:
    state = random_state(exit_dim=5)
    renamed = {
        name.replace("input_proj.", "input_projs.").replace("lm_head.", "lm_heads."): tensor
        for name, tensor in state.items()
    }
    fields = {
        "vocab_size": 60,
        "redrafter_hidden_size": 4,
        "redrafter_exit_dim": 5,
        "redrafter_num_layers": 2,
        "redrafter_is_rnn": True,
        "redrafter_num_beams": 5,
        "redrafter_draft_len_per_beam": 3,
    }

    drafter = convert(
        store(tmp_path / "trtllm", fields, renamed), tmp_path / "ours", source_format="trtllm", verifier="org/target"
    )

    assert_same_bits(tmp_path / "ours", state)
    assert (drafter.config.beam_width, drafter.config.draft_length, drafter.config.verifier) == (5, 3, "org/target")


def test_tensorrt_llms_tensor_names_beside_apples_config_count_as_its_format(tmp_path: Path) -> None:
    state = random_state()
    renamed = {name.replace("lm_head.", "0."): tensor for name, tensor in state.items()}

    convert(store(tmp_path / "older", APPLE, renamed), tmp_path / "ours", source_format="trtllm")

    assert_same_bits(tmp_path / "ours", state)


def test_the_eplatero_forks_drafter_becomes_ours_with_its_target(tmp_path: Path) -> None:
    state = random_state()
    fields = APPLE | {
        "speculators_model_type": "recurrent_drafting",
        "speculators_config": {
            "proposal_methods": [{"beam_width": 6, "beam_length": 5, "top_k": 20}],
            "verifier": {"name_or_path": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        },
    }

    convert(store(tmp_path / "fork", fields, state), tmp_path / "ours", source_format="eplatero")

    assert_same_bits(tmp_path / "ours", state)
    written = read_config(tmp_path / "ours")
    assert (written["beam_width"], written["draft_length"], written["top_k"]) == (6, 4, 20)
    assert written["speculators_config"]["verifier"] == {"name_or_path": "gpt2", "architectures": ["GPT2LMHeadModel"]}


def test_a_target_on_this_machine_is_recorded_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    apple = store(tmp_path / "apple", APPLE, random_state())
    monkeypatch.chdir(tmp_path)

    convert(apple, tmp_path / "ours", source_format="apple", verifier="target")

    assert read_config(tmp_path / "ours")["speculators_config"]["verifier"] == {
        "name_or_path": str(tmp_path / "target"),
        "architectures": ["LlamaForCausalLM"],
    }


def test_the_tokenizer_and_the_records_beside_a_drafter_come_along(ours: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "provenance.json", "evaluation.json", "notes.txt"):
        (ours / name).write_text(f'"{name}"')

    convert(ours, tmp_path / "apple", target_format="apple")

    assert sorted(path.name for path in (tmp_path / "apple").iterdir()) == [
        "config.json",
        "evaluation.json",
        "model.safetensors",
        "provenance.json",
        "tokenizer.json",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"draft_vocab_size": 7},
            r"a draft vocabulary \(its head knows 7 of 60 tokens\): train a drafter with --draft-vocab-size all$",
        ),
        (
            {"tie_lm_head": True, "exit_dim": 4},
            r"head that is the target's: store .* as 'lm_head.2.weight' and",
        ),
        (
            {"fused_layers": [0, 3]},
            r"fused layers \(it sees the outputs of \[0, 3\] .*: train a drafter without fused_layers$",
        ),
        ({"top_k": None}, r"top_k null \(its programs always keep 50 candidates\): set top_k to 50 in its config"),
        ({"top_k": 20}, r"top_k 20 \(its programs always keep 50"),
    ],
)
def test_what_apples_format_cannot_hold_is_refused_with_the_way_out(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    drafter = ReDrafter(ReDrafterConfig(**({"hidden_size": 4, "vocab_size": 60, "top_k": 50} | changes)))
    if "draft_vocab_size" in changes:
        drafter.set_draft_vocabulary(torch.arange(7))
    checkpoint.save_drafter(drafter, tmp_path / "ours")

    with pytest.raises(ValueError, match=rf"cannot be written to '.*apple' in Apple's format, .*{message}"):
        convert(tmp_path / "ours", tmp_path / "apple", target_format="apple")

    assert not (tmp_path / "apple").exists()


def test_a_vocabulary_below_apples_fifty_candidates_needs_no_top_k(tmp_path: Path) -> None:
    checkpoint.save_drafter(ReDrafter(ReDrafterConfig(hidden_size=4, vocab_size=50)), tmp_path / "ours")

    convert(tmp_path / "ours", tmp_path / "apple", target_format="apple")

    assert read_config(tmp_path / "apple")["vocab_size"] == 50


@pytest.mark.parametrize(
    ("named", "found"), [("trtllm", "apple"), ("eplatero", "apple"), ("redrafter", "apple"), ("apple", "redrafter")]
)
def test_a_drafter_of_another_format_than_named_is_refused_with_the_right_name(
    ours: Path, tmp_path: Path, named: str, found: str
) -> None:
    source = ours if found == "redrafter" else store(tmp_path / "apple", APPLE, random_state())

    with pytest.raises(ValueError, match=rf"'{source}' is not in .* format but in .*: pass --from {found}$"):
        convert(source, tmp_path / "result", source_format=named, target_format="redrafter")


def test_a_format_that_nobody_knows_is_refused_with_those_that_are(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no format 'medusa': choose from redrafter, apple, trtllm, eplatero"):
        convert(ours, tmp_path / "result", source_format="medusa")
    with pytest.raises(ValueError, match=r"no format 'trtllm': choose from redrafter, apple$"):
        convert(ours, tmp_path / "result", target_format="trtllm")


def test_what_is_no_drafter_is_refused_by_its_kind(tmp_path: Path) -> None:
    source = store(tmp_path / "llama", {"model_type": "llama"}, random_state())

    with pytest.raises(ValueError, match="is a llama model, not a ReDrafter drafter"):
        convert(source, tmp_path / "result", source_format="apple")


def test_a_directory_that_holds_something_is_left_alone_unless_it_may_be_overwritten(
    ours: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").write_text("{}")

    with pytest.raises(ValueError, match=r"taken' is there and not empty: pass another directory, or --overwrite"):
        convert(ours, taken, target_format="apple")
    assert [path.name for path in taken.iterdir()] == ["config.json"]

    convert(ours, taken, target_format="apple", overwrite=True)
    assert read_config(taken)["model_type"] == "recurrent_drafting_drafter"


def test_a_drafter_is_not_converted_onto_itself(ours: Path) -> None:
    with pytest.raises(ValueError, match="is the drafter that is to be converted: pass another directory"):
        convert(ours, ours / ".." / "ours", target_format="apple", overwrite=True)


def test_a_place_that_cannot_be_written_is_refused(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be saved to '.*file': it is a file, pass a directory"):
        convert(ours, tmp_path / "file", target_format="apple")
    with pytest.raises(ValueError, match=r"cannot be saved to '.*below' \(Not a directory\): make room or give write"):
        convert(ours, tmp_path / "file" / "below", target_format="apple")


def test_a_full_disk_leaves_nothing_half_written(ours: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a file may grow to what the config takes, and the weights do not fit: the kernel answers as a full disk does
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot be saved to '.*apple' \(.*File too large") as caught:
            convert(ours, tmp_path / "apple", target_format="apple")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert "\n" not in str(caught.value)
    assert list((tmp_path / "apple").iterdir()) == []
