"""The `speculators` library reads our checkpoints with its own functions, and saves them as they were."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_redrafter.core import checkpoint
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

speculators = pytest.importorskip("speculators")
registered = pytest.importorskip("vllm_redrafter.training.speculators")

ROOT = Path(__file__).parents[2]

DRAFTERS: dict[str, dict[str, Any]] = {
    "all defaults": {},
    "draft vocabulary and projection": {"draft_vocab_size": 7, "exit_dim": 5, "num_draft_layers": 1},
    "fused layers": {"fused_layers": [0, 3]},
    "tied head": {"tie_lm_head": True, "exit_dim": 4},
    "sum of embeddings, no target": {"rnn": False, "num_draft_layers": 0, "verifier": None},
    "Apple's, with its norm": {"top_k": 50, "emb_norm": True, "trained_draft_length": 5, "num_speculative_tokens": 21},
}


@pytest.fixture(params=DRAFTERS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A drafter of our own, in bfloat16."""
    fields = {"hidden_size": 4, "vocab_size": 12, "verifier": "org/target"} | DRAFTERS[request.param]
    drafter = ReDrafter(ReDrafterConfig(**fields))
    if drafter.config.draft_vocab_size is not None:
        drafter.set_draft_vocabulary(torch.tensor([0, 2, 3, 5, 7, 8, 11]))
    unused = {"emb_norm.weight": torch.full((4,), 7.0, dtype=torch.bfloat16)} if drafter.config.emb_norm else {}
    checkpoint.save_drafter(drafter, tmp_path / "saved", dtype=torch.bfloat16, unused=unused)
    return tmp_path / "saved"


def read_config(directory: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return fields


def test_a_config_that_the_library_read_and_saved_is_unchanged(saved: Path, tmp_path: Path) -> None:
    config = speculators.SpeculatorModelConfig.from_pretrained(saved)
    config.save_pretrained(tmp_path / "again")

    assert type(config) is registered.ReDrafterSpeculatorConfig
    assert config.hidden_size == 4
    assert config.speculators_config.verifier.name_or_path == read_config(saved)["verifier"]
    assert read_config(tmp_path / "again") == read_config(saved)


def test_a_model_that_the_library_read_and_saved_is_unchanged(saved: Path, tmp_path: Path) -> None:
    model = speculators.SpeculatorModel.from_pretrained(saved)
    model.save_pretrained(tmp_path / "again")

    assert type(model) is registered.ReDrafter
    before, after = load_file(saved / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert read_config(tmp_path / "again") == read_config(saved)
    # nothing else, and none of our source
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["config.json", "model.safetensors"]


def test_the_drafter_behind_the_librarys_model_is_the_one_that_we_load(saved: Path) -> None:
    ours = checkpoint.load_drafter(saved, dtype=None)

    theirs = speculators.SpeculatorModel.from_pretrained(saved).to_drafter()

    assert theirs.config.to_dict() == ours.config.to_dict()
    expected, found = ours.state_dict(), theirs.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_what_the_library_changed_and_saved_is_a_drafter_of_ours(tmp_path: Path) -> None:
    checkpoint.save_drafter(ReDrafter(ReDrafterConfig(hidden_size=4, vocab_size=12)), tmp_path / "saved")
    model = speculators.SpeculatorModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        model.rnn_w.weight.fill_(2.0)

    model.save_pretrained(tmp_path / "again")

    assert checkpoint.load_drafter(tmp_path / "again").get_parameter("rnn_w.weight").eq(2.0).all()


def test_a_config_that_no_drafter_can_be_built_from_is_refused_by_its_rule(tmp_path: Path) -> None:
    checkpoint.save_drafter(ReDrafter(ReDrafterConfig(hidden_size=4, vocab_size=12)), tmp_path)
    fields = read_config(tmp_path) | {"beam_width": 0}
    (tmp_path / "config.json").write_text(json.dumps(fields))

    with pytest.raises(ValueError, match="beam_width is 0, but it must be a positive integer"):
        speculators.SpeculatorModel.from_pretrained(tmp_path)


def test_what_the_library_would_do_with_other_drafters_is_refused_with_what_to_do(tmp_path: Path) -> None:
    checkpoint.save_drafter(ReDrafter(ReDrafterConfig(hidden_size=4, vocab_size=12)), tmp_path)
    model = speculators.SpeculatorModel.from_pretrained(tmp_path)

    with pytest.raises(NotImplementedError, match=r"call to_drafter\(\)"):
        model(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="run `vllm-redrafter train`"):
        registered.ReDrafter.from_training_args(None)
    with pytest.raises(NotImplementedError, match="run `vllm-redrafter train`"):
        registered.ReDrafter.get_trainer_kwargs()


def test_the_librarys_own_drafters_are_still_known() -> None:
    assert {"eagle3", "mtp", "redrafter"} <= set(speculators.SpeculatorModel.registry)
    config = speculators.SpeculatorModelConfig.from_dict({"speculators_model_type": "eagle3"})
    assert type(config).__name__ == "Eagle3SpeculatorConfig"


def test_nothing_else_of_ours_imports_the_library() -> None:
    importing = [
        path.name
        for path in (ROOT / "vllm_redrafter").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.match(r"\s*(from|import) (speculators|vllm_redrafter\.training\.speculators)\b", line)
    ]

    assert set(importing) == {"speculators.py"}
