from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_port import checkpoint, formats
from mlx_port.checkpoint import load_drafter
from mlx_port.config import ReDrafterConfig
from tests.loopback_hub import running_hub
from tests.mlx_port.twins import EXAMPLE, HIDDEN, VARIANTS, VOCAB, load_twins, save_random, to_numpy
from vllm_redrafter.core import checkpoint as core

APPLE = {
    "model_type": "recurrent_drafting_drafter",
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "exit_dim": 2 * HIDDEN,
    "num_draft_layers": 2,
    "rnn": True,
    "emb_norm": True,
}


def _rewrite(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value != "removed"}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_configs_are_those_of_torch(variant: str, tmp_path: Path) -> None:
    directory = save_random(tmp_path, **VARIANTS[variant])

    ours, theirs = checkpoint.load_config(directory), core.load_config(directory)

    assert ours == ReDrafterConfig(**{name: getattr(theirs, name) for name in ours.__dataclass_fields__})


def test_apples_checkpoints_load(tmp_path: Path) -> None:
    directory = save_random(tmp_path)
    weights = mx.load(str(directory / "model.safetensors")) | {"emb_norm.weight": mx.ones(HIDDEN)}
    # MLX reads a tensor when it is used, and the file is about to be written
    mx.eval(weights)
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    (directory / "config.json").write_text(json.dumps(APPLE))

    twins = load_twins(directory)

    assert (twins.mlx.config.rnn, twins.mlx.config.top_k) == (True, 50)
    state = twins.mlx.advance(twins.mlx.start(mx.ones(HIDDEN)), mx.ones(HIDDEN))
    ones = core.torch.ones(HIDDEN)
    theirs = twins.torch.advance(twins.torch.start(ones), ones)
    expected = twins.torch.processed_logits(theirs).log_softmax(dim=-1).numpy()
    # sums of products in another order, in float32
    np.testing.assert_allclose(to_numpy(twins.mlx.log_probs(state)), expected, atol=2e-4, rtol=1e-5)


def test_apples_config_means_no_rnn_unless_it_says_so() -> None:
    fields = {name: value for name, value in APPLE.items() if name != "rnn"}

    assert formats.parse_config(fields, "config.json").rnn is False


def test_older_tensor_names_and_shards_load(tmp_path: Path) -> None:
    directory = save_random(tmp_path, exit_dim=48)
    weights = mx.load(str(directory / "model.safetensors"))
    expected = load_drafter(directory).logits
    old = {
        name.replace("input_proj.", "input_projs.0.").replace("lm_head.", "lm_heads."): array
        for name, array in weights.items()
    }
    parts = dict(list(old.items())[:3]), dict(list(old.items())[3:])
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate(parts):
        mx.save_safetensors(str(directory / f"part-{number}.safetensors"), part)
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    drafter = load_drafter(directory)

    state = drafter.advance(drafter.start(mx.ones(HIDDEN)), mx.ones(HIDDEN))
    assert mx.array_equal(drafter.logits(state), expected(state))


def test_a_hub_id_is_fetched_without_what_could_run(tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in save_random(tmp_path / "drafter").iterdir()}
    program = "import sys; from mlx_port import checkpoint; print(checkpoint.load_drafter(sys.argv[1]).config)"
    with running_hub() as (endpoint, hub):
        hub.branches["user/drafter"] = {"main": "c" * 40}
        hub.commits["c" * 40] = files | {"pytorch_model.bin": b"pickle", "run.py": b"print()"}
        # a process of its own: the Hub's client reads its environment when it is imported
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        result = subprocess.run(
            [sys.executable, "-c", program, "user/drafter"],
            env=environment,
            cwd=EXAMPLE.parents[1],
            capture_output=True,
            text=True,
        )

    assert result.stdout == f"{checkpoint.load_config(tmp_path / 'drafter')}\n", result.stderr
    assert not [request for request in hub.requests if request.endswith((".bin", ".py"))]


def test_a_drafter_keeps_its_type_unless_another_is_asked_for() -> None:
    stored, asked = load_drafter(EXAMPLE / "drafter"), load_drafter(EXAMPLE / "drafter", dtype=mx.float16)

    assert (stored.rnn_w.weight.dtype, asked.rnn_w.weight.dtype) == (mx.bfloat16, mx.float16)


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.25), (8, 0.02)])
def test_a_quantised_drafter_is_close_to_what_it_was(bits: int, tolerance: float) -> None:
    whole = load_drafter(EXAMPLE / "drafter", dtype=mx.float32)
    quantised = load_drafter(EXAMPLE / "drafter", dtype=mx.float32, bits=bits)
    mx.random.seed(0)
    hidden, embedding = mx.random.normal((256,)), mx.random.normal((256,)) * 0.05

    logits = [drafter.logits(drafter.advance(drafter.start(hidden), embedding)) for drafter in (whole, quantised)]

    # a rounding error of half a step of 2^-bits of the weights' range averages out over 256 products
    assert 0 < float((logits[0] - logits[1]).std() / logits[0].std()) < tolerance


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [
        (3, 64, "cannot be quantised to 3 bits in groups of 64: bits must be 4 or 8"),
        (4, 48, "groups of 48: bits must be 4 or 8 and the group size one of 32, 64, 128"),
        (4, 128, "with a layer 32 wide cannot be quantised in groups of 128: choose a group size that divides"),
    ],
)
def test_an_unsupported_quantisation_is_refused(bits: int, group_size: int, message: str, tmp_path: Path) -> None:
    directory = save_random(tmp_path)

    with pytest.raises(ValueError, match=message):
        load_drafter(directory, bits=bits, group_size=group_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama", "speculators_model_type": "removed"}, "says model_type 'llama', but a ReDrafter"),
        ({"hidden_size": "removed"}, "lacks 'hidden_size': add it"),
        ({"rnn": 1}, "rnn is 1, but it must be true or false"),
        ({"hidden_size": True}, "hidden_size is True, but it must be an integer"),
        ({"beam_widht": 3}, "has a key 'beam_widht': did you mean 'beam_width'"),
        ({"num_speculative_tokens": 64}, "the tree budget is 64, but it must lie between 1 and 63"),
        ({"draft_length": 0}, "draft_length is 0, but it must be 1 or more"),
        ({"num_draft_layers": -1}, "num_draft_layers is -1, but it must be 0 or more"),
        ({"draft_vocab_size": 98}, r"draft_vocab_size is 98, but it must lie between 1 and vocab_size \(97\)"),
        (
            {"tie_lm_head": True},
            r"exit_dim is 64, but a head tied to the target's needs exit_dim == hidden_size \(32\)",
        ),
        ({"top_k": 0}, "top_k is 0, but it must be 1 or more, or null"),
        ({"fused_layers": [1, 4]}, r"fused_layers is \[1, 4\], but here a drafter sees the target's last hidden state"),
        ({"fused_layer": [1]}, "has a key 'fused_layer': did you mean 'fused_layers'"),
        ({"exit_dim": 48}, r"missing: context_proj.weight \[48, 32\]"),
        ({"draft_vocab_size": 60}, "has a draft vocabulary, but no d2t and t2d"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = save_random(tmp_path)
    _rewrite(directory, **changes)

    with pytest.raises(ValueError, match=message):
        load_drafter(directory)


def test_weights_that_are_no_drafters_are_refused(tmp_path: Path) -> None:
    directory = save_random(tmp_path, draft_vocab_size=60)
    file = directory / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    for changed, message in (
        ({"rnn_u.bias": weights["rnn_u.bias"].astype(mx.int32)}, "rnn_u.bias.*is mlx.core.int32, but weights must be"),
        ({"rnn_u.bias": weights["rnn_u.bias"] / 0}, "rnn_u.bias.*holds NaN or infinity"),
        ({"t2d": ~weights["t2d"]}, "d2t and t2d in .* contradict each other"),
        ({"more": weights["rnn_u.bias"]}, r"not expected: more \[32\]"),
    ):
        mx.save_safetensors(str(file), weights | changed)
        with pytest.raises(ValueError, match=message):
            load_drafter(directory)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_drafter(directory)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    directory = save_random(tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")

    with pytest.raises(ValueError, match=r"holds pickled weights only \(pytorch_model.bin\), never loaded"):
        load_drafter(directory)


def test_a_directory_without_a_drafter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no config.json in .*: pass a directory that holds a drafter"):
        load_drafter(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json' is not JSON"):
        load_drafter(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(APPLE))
    with pytest.raises(ValueError, match=r"no model\.safetensors in"):
        load_drafter(tmp_path)
    with pytest.raises(ValueError, match=r"no drafter at '': pass a directory with config\.json or a Hub id"):
        load_drafter("")
