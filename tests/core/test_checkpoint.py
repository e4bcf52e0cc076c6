"""Drafters survive the way to disk and back bit for bit, and what is not a drafter is refused by name."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save_file

from tests.loopback_hub import MAIN, OLDER, TOKEN, Hub, running_hub, talk_to
from vllm_redrafter.core import checkpoint
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

HIDDEN, VOCAB = 4, 12


def make_drafter(**changes: Any) -> ReDrafter:
    drafter = ReDrafter(ReDrafterConfig(**({"hidden_size": HIDDEN, "vocab_size": VOCAB} | changes)))
    fill(drafter, seed=0)
    return drafter


def fill(drafter: ReDrafter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in drafter.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    size = drafter.config.draft_vocab_size
    if size is not None:
        drafter.set_draft_vocabulary(
            torch.randperm(drafter.config.vocab_size, generator=generator)[:size].sort().values
        )


def assert_same(loaded: ReDrafter, drafter: ReDrafter) -> None:
    assert loaded.config.to_dict() | {"architectures": None, "dtype": None} == drafter.config.to_dict()
    ours, theirs = drafter.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def rewrite(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a saved drafter; None removes one."""
    # read from memory: the file is about to be overwritten
    state = load((directory / "model.safetensors").read_bytes()) | {
        name.replace("__", "."): tensor for name, tensor in tensors.items()
    }
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, directory / "model.safetensors")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a small drafter of our own."""
    checkpoint.save_drafter(make_drafter(), tmp_path)
    return tmp_path


@st.composite
def configs(draw: st.DrawFn) -> ReDrafterConfig:
    hidden, vocab = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    tied = draw(st.booleans())
    return ReDrafterConfig(
        hidden_size=hidden,
        vocab_size=vocab,
        exit_dim=hidden if tied else draw(st.none() | st.integers(1, 9)),
        num_draft_layers=draw(st.integers(0, 3)),
        rnn=draw(st.booleans()),
        draft_vocab_size=draw(st.none() | st.integers(1, vocab)),
        tie_lm_head=tied,
        top_k=draw(st.none() | st.integers(1, 60)),
        fused_layers=draw(st.none() | st.sets(st.integers(0, 40), min_size=1, max_size=3).map(sorted)),
        emb_norm=draw(st.booleans()),
        beam_width=draw(st.integers(1, 64)),
        draft_length=draw(st.integers(1, 16)),
        num_speculative_tokens=draw(st.integers(1, 63)),
        trained_draft_length=draw(st.none() | st.integers(1, 16)),
        verifier=draw(st.none() | st.text()),
        verifier_architectures=draw(st.lists(st.text(), max_size=2)),
    )


@settings(max_examples=40, deadline=None)
@given(config=configs(), seed=st.integers(0, 99))
def test_any_valid_drafter_comes_back_bit_for_bit(config: ReDrafterConfig, seed: int) -> None:
    drafter = ReDrafter(config)
    fill(drafter, seed)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint.save_drafter(drafter, Path(directory))
        assert_same(checkpoint.load_drafter(directory), drafter)


def test_a_loaded_drafter_computes_what_the_saved_one_did(saved: Path) -> None:
    drafter, loaded = make_drafter(), checkpoint.load_drafter(saved)
    hidden, embedding = torch.ones(2, HIDDEN), torch.ones(2, HIDDEN)
    expected = drafter.logits(drafter.advance(drafter.start(hidden), embedding))
    assert torch.equal(loaded.logits(loaded.advance(loaded.start(hidden), embedding)), expected)


def test_a_loaded_drafter_is_ready_for_inference(saved: Path) -> None:
    loaded = checkpoint.load_drafter(saved)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(parameter.device.type == "cpu" for parameter in loaded.parameters())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16, torch.float32])
def test_every_storage_type_loads_as_every_type(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    drafter = make_drafter(draft_vocab_size=5)
    checkpoint.save_drafter(drafter, tmp_path, dtype=stored)
    loaded = checkpoint.load_drafter(tmp_path, dtype=wanted)
    for name, parameter in drafter.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(stored).to(wanted))
    assert loaded.d2t is not None
    assert loaded.d2t.dtype == torch.int64


def test_the_weights_say_that_they_are_torchs_and_the_config_says_their_type(tmp_path: Path) -> None:
    checkpoint.save_drafter(make_drafter(), tmp_path, dtype=torch.bfloat16)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as content:
        assert content.metadata() == {"format": "pt"}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert written["architectures"] == ["ReDrafter"]


def test_vllms_own_speculators_reader_accepts_a_saved_config(saved: Path) -> None:
    base = pytest.importorskip("vllm.transformers_utils.configs.speculators.base")
    written = json.loads((saved / "config.json").read_text())
    base.SpeculatorsConfig.validate_speculators_config(written)
    del written["transformer_layer_config"]
    with pytest.raises(ValueError, match="transformer_layer_config"):
        base.SpeculatorsConfig.validate_speculators_config(written)


def test_saving_leaves_two_files_and_the_drafter_as_it_was(tmp_path: Path) -> None:
    drafter = make_drafter()
    before = drafter.config.to_dict()
    checkpoint.save_drafter(drafter, tmp_path / "deep" / "er", dtype=torch.float16)
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == ["config.json", "model.safetensors"]
    assert drafter.config.to_dict() == before
    assert {parameter.dtype for parameter in drafter.parameters()} == {torch.float32}


def test_a_failed_save_keeps_the_former_drafter_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(state: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    other = make_drafter(beam_width=2)
    with pytest.raises(
        ValueError, match=r"cannot be saved to '.*' \(no space left on device\): make room or give write"
    ):
        checkpoint.save_drafter(other, saved)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(checkpoint.load_drafter(saved), make_drafter())


def test_who_has_the_former_files_open_keeps_reading_them_whole(saved: Path) -> None:
    names = ("config.json", "model.safetensors")
    before = [(saved / name).read_bytes() for name in names]
    with (saved / names[0]).open("rb") as config, (saved / names[1]).open("rb") as weights:
        checkpoint.save_drafter(make_drafter(beam_width=2, num_draft_layers=1), saved)
        assert [config.read(), weights.read()] == before
    assert [(saved / name).read_bytes() for name in names] != before


def test_a_drafter_can_be_saved_over_the_one_it_was_loaded_from(saved: Path) -> None:
    checkpoint.save_drafter(checkpoint.load_drafter(saved), saved)
    assert_same(checkpoint.load_drafter(saved), make_drafter())


def test_a_file_is_not_a_place_to_save_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be saved to '.*file': it is a file, pass a directory"):
        checkpoint.save_drafter(make_drafter(), tmp_path / "file")


def test_weights_that_could_not_be_loaded_back_are_not_saved(tmp_path: Path) -> None:
    drafter = make_drafter()
    drafter.rnn_u.bias.data[1] = 1e6
    with pytest.raises(ValueError, match=r"'rnn_u.bias' .* overflows in torch.float16: use torch.bfloat16"):
        checkpoint.save_drafter(drafter, tmp_path, dtype=torch.float16)
    drafter.rnn_u.bias.data[1] = math.nan
    with pytest.raises(ValueError, match=r"tensor 'rnn_u.bias' .* holds NaN or infinity"):
        checkpoint.save_drafter(drafter, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unset_draft_vocabulary_is_not_saved(tmp_path: Path) -> None:
    drafter = ReDrafter(ReDrafterConfig(hidden_size=HIDDEN, vocab_size=VOCAB, draft_vocab_size=5))
    with pytest.raises(ValueError, match=r"d2t and t2d .* contradict each other: d2t names 5 tokens, t2d 0"):
        checkpoint.save_drafter(drafter, tmp_path)


def test_a_config_that_could_not_be_read_back_is_not_saved(tmp_path: Path) -> None:
    drafter = make_drafter()
    drafter.config.verifier = Path("org/target")
    with pytest.raises(ValueError, match=r"verifier is .*Path.*, but it must be a string or null"):
        checkpoint.save_drafter(drafter, tmp_path)


OLDER_NAMES = {
    "Apple": ("{}", "{}"),
    "TensorRT-LLM": ("input_projs.{}", "lm_heads.{}"),
    "before that": ("input_projs.0.{}", "0.{}"),
}


@pytest.mark.parametrize("names", OLDER_NAMES)
def test_apples_directories_load_under_all_tensor_names(tmp_path: Path, names: str) -> None:
    drafter = make_drafter(exit_dim=6, top_k=50, trained_draft_length=5, emb_norm=True)
    projection, head = OLDER_NAMES[names]
    state = {"emb_norm.weight": torch.ones(HIDDEN)}
    for name, tensor in drafter.state_dict().items():
        module, rest = name.split(".", 1)
        template = {"input_proj": projection, "lm_head": head}.get(module, "{}")
        state[name if template == "{}" else template.format(rest)] = tensor
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = {
        "model_type": "recurrent_drafting_drafter",
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "exit_dim": 6,
        "num_draft_layers": 2,
        "rnn": True,
        "emb_norm": True,
        "num_lookback_tokens": -1,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert_same(checkpoint.load_drafter(tmp_path), drafter)


def test_a_tensor_that_is_there_under_two_names_is_refused(saved: Path) -> None:
    rewrite(saved, lm_heads__2__weight=torch.zeros(VOCAB, 2 * HIDDEN))
    with pytest.raises(
        ValueError, match=r"tensor 'lm_head.2.weight' is there twice, as 'lm_head.* and as 'lm_head.*remove"
    ):
        checkpoint.load_drafter(saved)


def shard(directory: Path) -> None:
    state = load((directory / "model.safetensors").read_bytes())
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for index, name in enumerate(state):
        weight_map[name] = f"model-0000{1 + index % 2}-of-00002.safetensors"
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in state.items() if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_with_an_index_load(saved: Path) -> None:
    shard(saved)
    assert_same(checkpoint.load_drafter(saved), make_drafter())


def test_an_absent_shard_is_named(saved: Path) -> None:
    shard(saved)
    (saved / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names 'model-00002-of-00002.safetensors', which is not there: download"):
        checkpoint.load_drafter(saved)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"rnn_w.weight": "../model.safetensors"}}, "which is not beside it: export"),
        ({"weight_map": {"rnn_w.weight": "/etc/passwd"}}, "which is not beside it: export"),
        ({"weight_map": ["a"]}, "has no weight_map of tensor names to file names"),
        ({"weight_map": {"rnn_w.weight": 3}}, "has no weight_map of tensor names to file names"),
        ({}, "has no weight_map of tensor names to file names"),
    ],
)
def test_an_index_that_is_not_one_is_refused(saved: Path, index: dict[str, Any], message: str) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_drafter(saved)


def test_missing_extra_and_misshapen_tensors_are_named_together(saved: Path) -> None:
    rewrite(saved, rnn_w__weight=None, surplus__weight=torch.ones(3), rnn_u__bias=torch.ones(5))
    with pytest.raises(ValueError, match=r"not those that its config.json describes") as caught:
        checkpoint.load_drafter(saved)
    for part in (
        "missing: rnn_w.weight [4, 4];",
        "not expected: surplus.weight [3];",
        "of another shape: rnn_u.bias (expected [4], found [5]).",
        "Correct the config, or export the drafter again",
    ):
        assert part in str(caught.value)


def test_a_long_list_of_tensors_is_cut_short(saved: Path) -> None:
    rewrite(saved, **{f"extra_{index}": torch.ones(1) for index in range(9)})
    with pytest.raises(ValueError, match=r"not expected: extra_0 \[1\].*extra_4 \[1\] and 4 more"):
        checkpoint.load_drafter(saved)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_nan_and_infinity_are_refused_by_tensor(tmp_path: Path, value: float, stored: torch.dtype) -> None:
    checkpoint.save_drafter(make_drafter(), tmp_path, dtype=stored)
    weight = torch.ones(HIDDEN, HIDDEN, dtype=stored)
    weight[2, 1] = value
    rewrite(tmp_path, rnn_w__weight=weight)
    with pytest.raises(ValueError, match=r"tensor 'rnn_w.weight' in '.*model.safetensors' holds NaN or infinity"):
        checkpoint.load_drafter(tmp_path)


def test_weights_that_overflow_in_the_wanted_type_are_refused(saved: Path) -> None:
    rewrite(saved, rnn_w__weight=torch.full((HIDDEN, HIDDEN), 1e5))
    checkpoint.load_drafter(saved, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"tensor 'rnn_w.weight' .* overflows in torch.float16"):
        checkpoint.load_drafter(saved, dtype=torch.float16)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(saved: Path, stored: torch.dtype) -> None:
    rewrite(saved, rnn_w__weight=torch.ones(HIDDEN, HIDDEN).to(stored))
    with pytest.raises(
        ValueError, match=rf"'rnn_w.weight' .* is {stored}, but weights must be .*: export it unquantised"
    ):
        checkpoint.load_drafter(saved)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "drafter.pt", "drafter.pth", "epoch=1.ckpt"])
def test_a_pickle_is_never_loaded(saved: Path, name: str) -> None:
    (saved / "model.safetensors").unlink()
    torch.save({}, saved / name)
    with pytest.raises(
        ValueError, match=rf"pickled weights only \({name}\).*convert to safetensors.*torch.load\(\"{name}\""
    ):
        checkpoint.load_drafter(saved)


def test_a_pickle_beside_safetensors_does_not_matter(saved: Path) -> None:
    (saved / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert_same(checkpoint.load_drafter(saved), make_drafter())


def test_a_directory_without_weights_is_refused(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors in '.*': pass a drafter that has its weights as safe"):
        checkpoint.load_drafter(saved)


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "pointer"])
def test_a_damaged_safetensors_file_is_refused(saved: Path, damage: str) -> None:
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[:-7],
            "header": content[:8] + b"?" + content[9:],
            "empty": b"",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n",
        }[damage]
    )
    with pytest.raises(
        ValueError, match=r"'.*model.safetensors' is not a readable safetensors file .* download it again"
    ):
        checkpoint.load_drafter(saved)


@pytest.mark.parametrize(
    ("d2t", "t2d"),
    [
        ([0, 0, 0], [0, 1]),
        ([0, 0, 0], [0, 1, 3]),
        ([1, 0, 1], [1, 3]),
        ([3, 0, -1], [1, 3]),
        ([0, 0, 90], [0, 1]),
        ([-1, 0, 0], [1, 2]),
    ],
)
def test_draft_vocabulary_maps_that_contradict_each_other_are_refused(
    tmp_path: Path, d2t: list[int], t2d: list[int]
) -> None:
    checkpoint.save_drafter(make_drafter(draft_vocab_size=3), tmp_path)
    marks = torch.zeros(VOCAB, dtype=torch.bool)
    marks[t2d] = True
    rewrite(tmp_path, d2t=torch.tensor(d2t), t2d=marks)
    with pytest.raises(ValueError, match=f"contradict each other: d2t names 3 tokens, t2d {len(t2d)}"):
        checkpoint.load_drafter(tmp_path)


def test_draft_vocabulary_maps_of_another_type_are_refused(tmp_path: Path) -> None:
    checkpoint.save_drafter(make_drafter(draft_vocab_size=3), tmp_path)
    rewrite(tmp_path, d2t=torch.zeros(3))
    with pytest.raises(ValueError, match=r"tensor 'd2t' .* is torch.float32, but it must be torch.int64"):
        checkpoint.load_drafter(tmp_path)


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json in '.*': pass a directory that holds a drafter"):
        checkpoint.load_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json' is not JSON .*: download or export it again"),
        (b"\xff\xfe", "config.json' is not JSON .*: download or export it again"),
        (b"[1]", "config.json' holds list, but it must be a JSON object"),
    ],
)
def test_a_config_that_is_not_an_object_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_config(tmp_path)


def test_a_full_model_is_refused_before_its_weights_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(ValueError, match="is a llama model, not a ReDrafter drafter"):
        checkpoint.load_drafter(tmp_path)


def test_a_drafter_of_the_targets_sizes_passes() -> None:
    config = ReDrafterConfig(hidden_size=64, vocab_size=1000, fused_layers=[0, 5])
    checkpoint.check_against_target(config, hidden_size=64, vocab_size=1000, num_layers=6, target="org/target")


@pytest.mark.parametrize(
    ("hidden_size", "vocab_size", "difference"),
    [
        (128, 1000, "it has hidden_size 64 where the target has 128; pass"),
        (64, 1024, "it has vocab_size 1000 where the target has 1024; pass"),
        (
            128,
            1024,
            "it has hidden_size 64 where the target has 128 and vocab_size 1000 where the target has 1024; pass",
        ),
    ],
)
def test_a_drafter_of_another_target_is_refused_with_both_sizes(
    hidden_size: int, vocab_size: int, difference: str
) -> None:
    config = ReDrafterConfig(hidden_size=64, vocab_size=1000, verifier="org/other")
    message = (
        rf"the drafter \(trained for 'org/other'\) does not fit the target 'org/target': {difference} a drafter that"
    )
    with pytest.raises(ValueError, match=message):
        checkpoint.check_against_target(
            config, hidden_size=hidden_size, vocab_size=vocab_size, num_layers=6, target="org/target"
        )


def test_a_drafter_that_sees_a_layer_which_the_target_lacks_is_refused() -> None:
    config = ReDrafterConfig(hidden_size=64, vocab_size=1000, fused_layers=[2, 6])
    with pytest.raises(ValueError, match=r"it has fused_layers \[2, 6\] where the target has 6 layers; pass a drafter"):
        checkpoint.check_against_target(config, hidden_size=64, vocab_size=1000, num_layers=6, target="org/target")


BPE = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "</s>"}]}
UNIGRAM = {"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.5], ["</s>", 0.0]]}}


@pytest.fixture
def two_directories(tmp_path: Path) -> tuple[Path, Path]:
    """Where a drafter and a target would be."""
    directories = tmp_path / "drafter", tmp_path / "target"
    for directory in directories:
        directory.mkdir()
    return directories


def check_tokenizer(directories: tuple[Path, Path]) -> None:
    drafter, target = directories
    checkpoint.check_tokenizer(drafter, str(target))


@pytest.mark.parametrize(("ours", "theirs"), [(BPE, BPE), (BPE, UNIGRAM), (None, BPE), (BPE, None), (None, None)])
def test_the_same_tokens_or_no_tokenizer_at_all_pass(
    two_directories: tuple[Path, Path], ours: dict[str, Any] | None, theirs: dict[str, Any] | None
) -> None:
    for directory, content in zip(two_directories, (ours, theirs), strict=True):
        if content is not None:
            (directory / "tokenizer.json").write_text(json.dumps(content))
    check_tokenizer(two_directories)


@pytest.mark.parametrize(
    ("theirs", "example"),
    [
        ({"model": {"vocab": {"a": 1, "b": 0}}, "added_tokens": BPE["added_tokens"]}, r"2 tokens .*\('a': 0 and 1\)"),
        ({"model": {"vocab": {"a": 0, "b": 1}}}, r"1 tokens .*\('</s>': 2 and None\)"),
    ],
)
def test_another_tokenizer_is_refused_with_a_token(
    two_directories: tuple[Path, Path], theirs: dict[str, Any], example: str
) -> None:
    for directory, content in zip(two_directories, (BPE, theirs), strict=True):
        (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"the drafter's tokenizer is not the target's: {example}"):
        check_tokenizer(two_directories)


@pytest.mark.parametrize("content", [{}, {"model": []}, {"model": {"vocab": 3}}, BPE | {"added_tokens": [1]}])
def test_a_tokenizer_without_tokens_is_refused(two_directories: tuple[Path, Path], content: dict[str, Any]) -> None:
    for directory in two_directories:
        (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer.json' does not list a tokenizer's tokens: export it again"):
        check_tokenizer(two_directories)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A Hub that this process talks to; its repositories have a tokenizer, and at v1 another one."""
    with running_hub() as (endpoint, state):
        talk_to(endpoint, tmp_path, monkeypatch)
        for commit, vocabulary in ((MAIN, {"a": 0, "b": 1}), (OLDER, {"a": 1, "b": 0})):
            content = json.dumps(BPE | {"model": {"vocab": vocabulary}}).encode()
            state.commits[commit] = state.commits[commit] | {"tokenizer.json": content}
        yield state


def test_the_tokenizer_of_a_target_on_the_hub_is_compared_too(tmp_path: Path, hub: type[Hub]) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(BPE))

    checkpoint.check_tokenizer(tmp_path, "org/target")
    checkpoint.check_tokenizer(tmp_path, "org/gated", token=TOKEN)
    for target, token in (("org/target", None), ("org/gated", TOKEN)):
        with pytest.raises(ValueError, match=r"the drafter's tokenizer is not the target's: 2 tokens"):
            checkpoint.check_tokenizer(tmp_path, target, "v1", token)


@pytest.mark.parametrize(
    "target", ["org/gated", "org/missing", "org/forbidden", "org/broken", "s3://org/target", "./x"]
)
def test_a_tokenizer_that_cannot_be_read_is_not_compared(tmp_path: Path, hub: type[Hub], target: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(BPE))

    checkpoint.check_tokenizer(tmp_path, target, "v1")


def test_nothing_is_fetched_where_the_drafter_has_no_tokenizer(tmp_path: Path, hub: type[Hub]) -> None:
    checkpoint.check_tokenizer(tmp_path, "org/target", "v1")

    assert hub.requests == []
