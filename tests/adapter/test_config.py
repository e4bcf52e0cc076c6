from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.platforms
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from vllm import triton_utils
from vllm.config.compilation import CompilationConfig, CUDAGraphMode
from vllm.model_executor.models.gpt2 import GPT2LMHeadModel
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.utils.import_utils import resolve_obj_by_qualname

from tests.loopback_hub import OLDER, TOKEN, running_hub, talk_to
from vllm_redrafter.adapter import config, patches
from vllm_redrafter.adapter.config import UNSUPPORTED, ReDrafterOptions, read_options, translate
from vllm_redrafter.adapter.patches import PROPOSER_PATH, ContractCheck
from vllm_redrafter.adapter.v2 import automatic, scheduler, support
from vllm_redrafter.core.checkpoint import save_drafter
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

HIDDEN, VOCAB = 32, 48


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a drafter that fits the target."""
    torch.manual_seed(0)
    chosen = ReDrafterConfig(
        HIDDEN, VOCAB, num_draft_layers=1, beam_width=3, draft_length=5, num_speculative_tokens=10, verifier="a/target"
    )
    directory = tmp_path_factory.mktemp("drafters") / "drafter"
    save_drafter(ReDrafter(chosen), directory)
    return str(directory)


@pytest.fixture
def fused_drafter(tmp_path: Path) -> str:
    """The directory of a drafter that sees two layers of the target."""
    save_drafter(ReDrafter(ReDrafterConfig(HIDDEN, VOCAB, fused_layers=[0, 3])), tmp_path / "fused")
    return str(tmp_path / "fused")


@pytest.fixture
def copy_of(drafter: str, tmp_path: Path) -> Callable[..., str]:
    """Makes a copy of the drafter with other tensors."""

    def copied(edit: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None) -> str:
        (tmp_path / "config.json").write_text((Path(drafter) / "config.json").read_text())
        tensors = load_file(Path(drafter) / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        return str(tmp_path)

    return copied


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What is logged as a warning: vLLM's loggers do not propagate to pytest's."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    collector = Collector(logging.WARNING)
    config.logger.addHandler(collector)
    yield messages
    config.logger.removeHandler(collector)


def target_config(**changes: Any) -> SimpleNamespace:
    """Return what is read of vLLM's ModelConfig; a test below holds it against a real one."""
    found = {
        "model": "a/target",
        "tokenizer": None,
        "tokenizer_revision": None,
        "hf_token": None,
        "get_hidden_size": lambda: HIDDEN,
        "get_vocab_size": lambda: VOCAB,
        "get_total_num_hidden_layers": lambda: 4,
        "registry": SimpleNamespace(resolve_model_cls=lambda names, model_config: (LlamaForCausalLM, names[0])),
        "architectures": ["LlamaForCausalLM"],
        "hf_text_config": SimpleNamespace(),
        "use_mla": False,
        "is_hybrid": False,
        "is_attention_free": False,
        "uses_mrope": False,
        "is_multimodal_model": False,
        "is_encoder_decoder": False,
        "enforce_eager": False,
        "return_sampling_mask": False,
        "enable_trace_replay": False,
    }
    return SimpleNamespace(**(found | changes))


def parallel_config(**changes: Any) -> SimpleNamespace:
    found = {
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "enable_batch_sharded_sampling": None,
        "use_ubatching": False,
        "worker_cls": "auto",
        "worker_extension_cls": "",
        "data_parallel_size": 1,
    }
    return SimpleNamespace(**(found | changes))


def engine_args(request: dict[str, Any] | None, **changes: Any) -> SimpleNamespace:
    found = {
        "speculative_config": request,
        "spec_method": None,
        "spec_model": None,
        "spec_tokens": None,
        "additional_config": None,
        "kv_transfer_config": None,
        "kv_offloading_size": None,
        "compilation_config": CompilationConfig(),
        "scheduler_cls": None,
        "max_num_seqs": None,
    }
    return SimpleNamespace(**(found | changes))


def options_for(request: dict[str, Any], **changes: Any) -> ReDrafterOptions:
    """Return what `translate` hands to the other processes."""
    arguments = engine_args({"method": "redrafter", **request})
    translate(arguments, target_config(**changes), parallel_config())
    return ReDrafterOptions.of(arguments)


# what is understood


def test_what_is_left_out_comes_from_the_drafters_config(drafter: str) -> None:
    options = options_for({"model": drafter})

    assert options == ReDrafterOptions(drafter, 10, beam_width=3, draft_length=5, budget="auto")
    assert options.shape == (3, 5)


def test_what_is_given_counts(drafter: str) -> None:
    request = {"num_speculative_tokens": 63, "beam_width": 1, "draft_length": 2, "budget": "fixed"}

    assert options_for({"model": drafter, **request}) == ReDrafterOptions(drafter, 63, 1, 2, "fixed")


def test_fused_layers_come_from_the_drafters_config_alone(fused_drafter: str) -> None:
    options = options_for({"model": fused_drafter})

    assert options.fused_layers == [0, 3]
    # vLLM counts the embeddings too
    assert options.layers_handed_out == (1, 4)
    with pytest.raises(ValueError, match="unknown key 'fused_layers'"):
        options_for({"model": fused_drafter, "fused_layers": [1]})


def test_keys_may_be_spelled_with_dashes(drafter: str) -> None:
    options = options_for({"model": drafter, "num-speculative-tokens": 7, "beam-width": 2, "draft-length": 3})

    assert options == ReDrafterOptions(drafter, 7, 2, 3, "auto")


@pytest.mark.parametrize("request_", [None, {}, {"beam-width": 2}])
def test_vllms_flags_are_as_good_as_keys(drafter: str, request_: dict[str, Any] | None) -> None:
    by_flag = engine_args(request_, spec_method="redrafter", spec_model=drafter, spec_tokens=7)

    translate(by_flag, target_config(), parallel_config())

    expected = options_for({"model": drafter, "num_speculative_tokens": 7, **(request_ or {})})
    assert ReDrafterOptions.of(by_flag) == expected


def test_a_flag_and_a_key_for_one_thing_are_refused(drafter: str) -> None:
    request = {"method": "redrafter", "model": drafter, "num-speculative-tokens": 4}

    with pytest.raises(ValueError, match=r"spec_tokens is 8, but .* has 'num_speculative_tokens' too \(4\): leave"):
        translate(engine_args(request, spec_tokens=8), target_config(), parallel_config())


def test_apples_beam_length_counts_the_init_token(drafter: str) -> None:
    assert options_for({"model": drafter, "beam_length": 5}) == options_for({"model": drafter, "draft_length": 4})


def test_vllm_gets_a_config_that_it_knows_and_the_callers_is_left_alone(drafter: str) -> None:
    request = {"method": "redrafter", "model": drafter, "num_speculative_tokens": 4}
    arguments = engine_args(dict(request), additional_config={"theirs": 1})
    parallel = parallel_config()

    translated = translate(arguments, target_config(), parallel)

    assert translated == {"method": "custom_class", "model": PROPOSER_PATH, "num_speculative_tokens": 4}
    assert arguments.speculative_config == request
    assert arguments.additional_config["theirs"] == 1
    assert parallel.worker_cls == config.WORKER_PATH
    # it travels to other processes as plain values
    assert json.loads(json.dumps(arguments.additional_config)) == arguments.additional_config


@pytest.mark.parametrize("by_flag", [False, True], ids=["config", "flags"])
def test_a_real_vllm_config_is_made_of_it_without_an_engine(
    drafter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, by_flag: bool
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    for patch in patches.PATCHES[:1]:
        monkeypatch.setattr(EngineArgs, patch.name, patch.wrap(getattr(EngineArgs, patch.name)))
    given: dict[str, Any] = {
        "speculative_config": {"method": "redrafter", "model": drafter, "num_speculative_tokens": 6}
    }
    if by_flag:
        given = {"spec_method": "redrafter", "spec_model": drafter, "spec_tokens": 6}
    arguments = EngineArgs(str(tmp_path), skip_tokenizer_init=True, dtype="float32", **given)

    made = arguments.create_engine_config()

    assert made.speculative_config.method == "custom_class"
    assert made.speculative_config.num_speculative_tokens == 6
    assert patches.is_redrafter(made.speculative_config)
    assert made.parallel_config.worker_cls == config.WORKER_PATH
    assert ReDrafterOptions.of(made) == ReDrafterOptions(drafter, 6, 3, 5, "auto")
    assert given.items() <= vars(arguments).items()
    for name in vars(target_config()):
        assert hasattr(made.model_config, name)
    for name in vars(parallel_config()):
        assert hasattr(made.parallel_config, name)
    for name in vars(engine_args({})):
        assert hasattr(arguments, name)


# what is refused: values


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"beam_widht": 3}, "unknown key 'beam_widht' for method 'redrafter': did you mean 'beam_width'?"),
        ({"num-speculative-token": 3}, "'num_speculative_token'.*did you mean 'num_speculative_tokens'?"),
        ({"zzz": 1}, "unknown key 'zzz'.*known are method, model, revision, num_speculative_tokens, .* beam_width"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens is 0, but it must lie between 1 and 63"),
        ({"num_speculative_tokens": 64}, "num_speculative_tokens is 64, but it must lie between 1 and 63"),
        ({"num_speculative_tokens": "8"}, "num_speculative_tokens is '8', but it must lie between 1 and 63"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens is True"),
        ({"num_speculative_tokens": None}, "num_speculative_tokens is None"),
        ({"beam_width": 0}, "beam_width is 0, but it must be an integer of at least 1"),
        ({"beam_width": 64}, "beam_width is 64, but a tree has at most 63 nodes: ask for at most 63"),
        ({"beam_width": 2.5}, "beam_width is 2.5, but it must be an integer of at least 1"),
        ({"draft_length": 0}, "draft_length is 0, but it must be an integer of at least 1"),
        ({"draft_length": -3}, "draft_length is -3"),
        ({"draft_length": 100000}, "draft_length is 100000, but a tree has at most 63 nodes: ask for at most 63"),
        ({"beam_length": 65}, "beam_length is 65, but a tree has at most 63 nodes: ask for at most 64"),
        ({"beam_length": 0}, "beam_length is 0, but it must be an integer of at least 1"),
        ({"beam_length": 1}, "beam_length is 1, but it counts the init token: it must be at least 2"),
        ({"beam_length": 5, "draft_length": 4}, "draft_length and beam_length are both given.*keep one"),
        ({"budget": "never"}, 'budget is \'never\', but it must be "auto" or "fixed"'),
        ({"budget": None}, "budget is None"),
        ({"pack_target": 1}, "pack_target is 1, but it must be true, false or null"),
        ({"pack_target": "never"}, "pack_target is 'never'"),
        ({"revision": "main"}, "revision 'main' was given with the directory.*leave it out"),
    ],
    ids=lambda value: ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused_with_the_rule_and_the_remedy(
    drafter: str, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        options_for({"model": drafter, **request_})


def test_as_many_beams_and_as_long_ones_as_a_tree_has_nodes_may_be_asked_for(drafter: str) -> None:
    assert options_for({"model": drafter, "beam_width": 63, "beam_length": 64}).shape == (63, 63)


@pytest.mark.parametrize("model", [{}, {"model": ""}, {"model": None}, {"model": 3}])
def test_a_request_without_a_drafter_is_refused(model: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='has no "model": name the drafter\'s directory or Hub id'):
        options_for(model)


@pytest.mark.parametrize(("given", "warned"), [(5, False), (6, True), (1, False)])
def test_drafting_deeper_than_trained_is_warned_about(
    drafter: str, warnings: list[str], given: int, warned: bool
) -> None:
    assert options_for({"model": drafter, "draft_length": given}).draft_length == given

    expected = ["draft_length is 6, but the drafter was trained for 5: tokens beyond that are seldom accepted"]
    assert warnings == (expected if warned else [])


# what is refused: drafters


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no drafter at .*nowhere.*: pass a directory with config\.json or a Hub id"):
        options_for({"model": str(tmp_path / "nowhere")})


def test_a_directory_without_a_drafter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json in"):
        options_for({"model": str(tmp_path)})


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model_type": "eagle", "architectures": ["EAGLEModel"]}, "eagle"),
        ({"model_type": "medusa"}, "medusa"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "llama"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_by_its_name(tmp_path: Path, fields: dict[str, Any], kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))

    with pytest.raises(ValueError, match=rf"is an? {kind} model, not a ReDrafter drafter"):
        options_for({"model": str(tmp_path)})


def test_pickled_weights_are_refused_and_not_opened(drafter: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(drafter) / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"would run code")

    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model.bin\).*convert to safetensors"):
        options_for({"model": str(tmp_path)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("rnn_u.weight"), r"missing: rnn_u.weight \[32, 32\]"),
        (lambda tensors: tensors.update(more=torch.zeros(2)), r"not expected: more \[2\]"),
        (lambda tensors: tensors.update({"rnn_u.bias": torch.zeros(3)}), r"rnn_u.bias \(expected \[32\], found \[3\]"),
        (lambda tensors: tensors["rnn_u.bias"].fill_(float("nan")), "'rnn_u.bias'.*holds NaN or infinity"),
    ],
    ids=["missing", "extra", "misshapen", "NaN"],
)
def test_tensors_that_are_not_a_drafters_are_refused_by_name(
    copy_of: Callable[..., str], edit: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        options_for({"model": copy_of(edit)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"get_hidden_size": lambda: 64}, "hidden_size 32 where the target has 64"),
        ({"get_vocab_size": lambda: 50257}, "vocab_size 48 where the target has 50257"),
    ],
)
def test_a_drafter_of_another_target_is_refused_with_both_sizes(drafter: str, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"\(trained for 'a/target'\) does not fit the target 'a/target'.*{message}"):
        options_for({"model": drafter}, **change)


def test_a_drafter_with_another_tokenizer_is_refused(copy_of: Callable[..., str], tmp_path: Path) -> None:
    def tokenizer(directory: Path, **vocabulary: int) -> None:
        directory.mkdir(exist_ok=True)
        (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))

    directory = copy_of()
    tokenizer(Path(directory), a=0, b=1)
    same, other = tmp_path / "same", tmp_path / "other"
    tokenizer(same, a=0, b=1)
    tokenizer(other, a=1, b=0)

    assert options_for({"model": directory}, tokenizer=str(same)).model == directory
    with pytest.raises(ValueError, match="tokenizer is not the target's: 2 tokens"):
        options_for({"model": directory}, tokenizer=str(other))


def test_the_tokenizer_is_compared_at_the_targets_revision_and_with_its_token(
    copy_of: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of()
    ours, theirs = ({"model": {"vocab": vocabulary}} for vocabulary in ({"a": 0, "b": 1}, {"a": 1, "b": 0}))
    (Path(directory) / "tokenizer.json").write_text(json.dumps(ours))
    with running_hub() as (endpoint, state):
        talk_to(endpoint, tmp_path, monkeypatch)
        state.commits[OLDER] = {"tokenizer.json": json.dumps(theirs).encode()}

        with pytest.raises(ValueError, match="tokenizer is not the target's: 2 tokens"):
            options_for({"model": directory}, tokenizer="org/gated", tokenizer_revision="v1", hf_token=TOKEN)


# what is refused: combinations


@pytest.mark.parametrize(
    ("feature", "target", "parallel", "arguments"),
    [
        ("pipeline parallelism", {}, {"pipeline_parallel_size": 2}, {}),
        ("decode context parallelism", {}, {"decode_context_parallel_size": 2}, {}),
        ("MLA (DeepSeek-like) targets", {"use_mla": True}, {}, {}),
        ("Mamba, linear-attention and hybrid targets", {"is_hybrid": True}, {}, {}),
        ("Mamba, linear-attention and hybrid targets", {"is_attention_free": True}, {}, {}),
        ("M-RoPE and multimodal targets", {"uses_mrope": True}, {}, {}),
        ("M-RoPE and multimodal targets", {"is_multimodal_model": True}, {}, {}),
        ("encoder-decoder targets", {"is_encoder_decoder": True}, {}, {}),
        ("chunked local attention", {"hf_text_config": SimpleNamespace(attention_chunk_size=8192)}, {}, {}),
        ("cross-layer KV sharing", {"hf_text_config": SimpleNamespace(num_kv_shared_layers=10)}, {}, {}),
        ("KV connectors", {}, {}, {"kv_transfer_config": object()}),
        ("KV connectors", {}, {}, {"kv_offloading_size": 0.5}),
    ],
)
def test_a_combination_that_we_do_not_do_is_refused_with_the_reason(
    drafter: str, feature: str, target: dict[str, Any], parallel: dict[str, Any], arguments: dict[str, Any]
) -> None:
    made = engine_args({"method": "redrafter", "model": drafter}, **arguments)
    before = dict(vars(made))

    with pytest.raises(NotImplementedError) as raised:
        translate(made, target_config(**target), parallel_config(**parallel))

    reason = dict(UNSUPPORTED)[feature]
    assert str(raised.value) == (
        f"redrafter does not support {feature}, because {reason}: run without speculation, or without this feature"
    )
    assert vars(made) == before


def without_layers() -> SimpleNamespace:
    """Return what finds a target of vLLM's without the interface for EAGLE-3."""
    return SimpleNamespace(resolve_model_cls=lambda names, model_config: (GPT2LMHeadModel, names[0]))


def test_fused_layers_of_a_target_that_does_not_hand_them_out_are_refused(fused_drafter: str) -> None:
    with pytest.raises(NotImplementedError) as raised:
        options_for({"model": fused_drafter}, registry=without_layers())

    assert str(raised.value) == (
        "the drafter sees what leaves the layers 0, 3, which vLLM's GPT2LMHeadModel does not hand out (no EAGLE-3 "
        "interface): use a drafter without fused_layers"
    )


def test_fused_layers_that_the_target_lacks_are_refused(fused_drafter: str) -> None:
    with pytest.raises(ValueError, match=r"it has fused_layers \[0, 3\] where the target has 3 layers; pass a drafter"):
        options_for({"model": fused_drafter}, get_total_num_hidden_layers=lambda: 3)


@pytest.fixture
def v2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model runner V2, which a CPU has under Triton's interpreter."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr(triton_utils, "HAS_TRITON", True)


V2_CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("prefill context parallelism", {}, {"prefill_context_parallel_size": 2}, {}),
    ("dual batch overlap", {}, {"use_ubatching": True}, {}),
    ("batch-sharded sampling", {}, {"enable_batch_sharded_sampling": True}, {}),
    ("sampling masks", {"return_sampling_mask": True}, {}, {}),
    ("trace replay", {"enable_trace_replay": True}, {}, {}),
    (
        "FULL CUDA graphs of mixed batches",
        {},
        {},
        {"compilation_config": CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL)},
    ),
]


@pytest.mark.parametrize(("feature", "target", "parallel", "arguments"), V2_CASES)
def test_a_combination_that_v2_does_not_do_is_refused_there(
    v2: None, drafter: str, feature: str, target: dict[str, Any], parallel: dict[str, Any], arguments: dict[str, Any]
) -> None:
    made = engine_args({"method": "redrafter", "model": drafter}, **arguments)
    reason = dict(UNSUPPORTED)[feature]

    with pytest.raises(NotImplementedError, match=re.escape(f"does not support {feature}, because {reason}")):
        translate(made, target_config(**target), parallel_config(**parallel))


def test_graphs_are_no_matter_where_none_are_captured(v2: None, drafter: str) -> None:
    full = CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL)
    arguments = engine_args({"method": "redrafter", "model": drafter}, compilation_config=full)

    assert translate(arguments, target_config(enforce_eager=True), parallel_config())["method"] == "ngram_gpu"


def test_runner_v2_gets_a_method_that_it_knows_and_an_extension_of_its_worker(v2: None, drafter: str) -> None:
    arguments = engine_args({"method": "redrafter", "model": drafter, "num_speculative_tokens": 4})
    parallel = parallel_config()

    translated = translate(arguments, target_config(), parallel)

    sizes = translated.pop("num_speculative_tokens_per_batch_size")
    assert translated == {"method": "ngram_gpu", "model": PROPOSER_PATH, "num_speculative_tokens": 4}
    assert {size for _, _, size in sizes} == {4, 2, 1, 0}
    assert patches.is_redrafter(SimpleNamespace(**translated))
    assert (parallel.worker_cls, parallel.worker_extension_cls) == ("auto", support.EXTENSION_PATH)


def test_fused_layers_are_served_under_v2_where_the_target_hands_them_out(v2: None, fused_drafter: str) -> None:
    assert options_for({"model": fused_drafter}).fused_layers == [0, 3]
    with pytest.raises(NotImplementedError, match="GPT2LMHeadModel does not hand out"):
        options_for({"model": fused_drafter}, registry=without_layers())


def test_packing_the_target_is_refused_under_v2(v2: None, drafter: str) -> None:
    with pytest.raises(ValueError, match="pack_target is for CPUs, and does nothing under model runner V2: leave it"):
        options_for({"model": drafter, "pack_target": True})


@pytest.mark.parametrize("pack_target", [True, False, None])
def test_the_target_is_packed_where_that_is_quicker_unless_something_else_is_asked_for(
    drafter: str, *, pack_target: bool | None
) -> None:
    assert options_for({"model": drafter}).pack_target is None
    assert options_for({"model": drafter, "pack_target": pack_target}).pack_target is pack_target


@pytest.mark.parametrize("asked", [{}, {"budget": "auto"}])
def test_under_v2_a_scheduler_of_ours_chooses_sizes(v2: None, drafter: str, asked: dict[str, str]) -> None:
    arguments = engine_args({"method": "redrafter", "model": drafter, **asked}, max_num_seqs=16)

    translated = translate(arguments, target_config(), parallel_config())

    assert ReDrafterOptions.of(arguments).budget == "auto"
    make = resolve_obj_by_qualname(arguments.scheduler_cls)
    assert make is scheduler.make
    sizes = translated["num_speculative_tokens_per_batch_size"]
    assert (sizes[0][0], sizes[-1][1]) == (1, 16)
    assert [size for _, _, size in sizes] == [10, 5, 2, 0]


def test_a_fixed_budget_under_v2_leaves_scheduler_and_sizes_alone(v2: None, drafter: str) -> None:
    arguments = engine_args({"method": "redrafter", "model": drafter, "budget": "fixed"})

    translated = translate(arguments, target_config(), parallel_config())

    assert "num_speculative_tokens_per_batch_size" not in translated
    assert arguments.scheduler_cls is None


def test_arguments_may_make_one_engine_with_an_automatic_budget_and_one_without(v2: None, drafter: str) -> None:
    arguments = engine_args({"method": "redrafter", "model": drafter})

    schedulers = []
    for budget in ("auto", "auto", "fixed"):
        arguments.speculative_config["budget"] = budget
        translate(arguments, target_config(), parallel_config())
        schedulers.append(arguments.scheduler_cls)

    assert schedulers == [automatic.SCHEDULER_PATH, automatic.SCHEDULER_PATH, None]


@pytest.mark.parametrize(
    ("request_", "arguments", "parallel", "reason"),
    [
        (
            {"num_speculative_tokens_per_batch_size": [[1, 8, 4]]},
            {},
            {},
            "num_speculative_tokens_per_batch_size says how large trees are",
        ),
        (
            {},
            {"scheduler_cls": "my.Scheduler"},
            {},
            "the scheduler that chooses sizes is ours, and scheduler_cls is 'my.Scheduler'",
        ),
        (
            {},
            {},
            {"data_parallel_size": 2},
            "with data parallelism (data_parallel_size) vLLM lets no rank choose for itself",
        ),
    ],
    ids=["sizes", "scheduler", "data parallel"],
)
def test_where_sizes_cannot_be_chosen_under_v2_they_are_fixed_and_who_asks_for_it_is_told(
    v2: None, drafter: str, request_: dict[str, Any], arguments: dict[str, Any], parallel: dict[str, Any], reason: str
) -> None:
    request_ = {"method": "redrafter", "model": drafter, **request_}
    made = engine_args(request_, **arguments)

    translate(made, target_config(), parallel_config(**parallel))

    assert ReDrafterOptions.of(made).budget == "fixed"
    assert made.scheduler_cls == arguments.get("scheduler_cls")
    asking = engine_args({**request_, "budget": "auto"}, **arguments)
    with pytest.raises(ValueError, match=re.escape(f'budget is "auto", but {reason}: leave one of the two out')):
        translate(asking, target_config(), parallel_config(**parallel))


def test_a_budget_that_is_neither_is_refused_under_v2_too(v2: None, drafter: str) -> None:
    with pytest.raises(ValueError, match='budget is \'never\', but it must be "auto" or "fixed"'):
        options_for({"model": drafter, "budget": "never"})


SCHEDULE = {"num_speculative_tokens_per_batch_size": [[9, 64, 0], [1, 8, 4]]}


def test_sizes_by_batch_size_are_handed_to_vllm_under_v2(v2: None, drafter: str) -> None:
    arguments = engine_args({"method": "redrafter", "model": drafter, **SCHEDULE})

    translated = translate(arguments, target_config(), parallel_config())

    assert translated["num_speculative_tokens_per_batch_size"] == [(1, 8, 4), (9, 64, 0)]


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        ([], "must not be empty"),
        ("1-8:4", "must be a non-empty list of"),
        ([[1, 8]], "3-item sequence"),
        ([[1, 8, -1]], "values must be >= 0"),
        ([[2, 8, 4]], "must start at 1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(v2: None, drafter: str, schedule: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        options_for({"model": drafter, "num_speculative_tokens_per_batch_size": schedule})


def test_sizes_by_batch_size_are_refused_where_every_step_chooses_its_own(drafter: str) -> None:
    with pytest.raises(ValueError, match="on a CPU the size of trees is chosen at every step, so leave it out"):
        options_for({"model": drafter, **SCHEDULE})


def test_runner_v2_needs_triton(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr(triton_utils, "HAS_TRITON", False)

    with pytest.raises(NotImplementedError, match="does not support model runner V2 without Triton, because"):
        options_for({"model": drafter})


def gpu(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    found = SimpleNamespace(
        is_cpu=lambda: False, is_cuda=lambda: True, has_device_capability=lambda least: capability >= least
    )
    monkeypatch.setattr(vllm.platforms, "current_platform", found)
    monkeypatch.setattr(triton_utils, "HAS_TRITON", True)


def test_a_gpu_runs_v2_by_default(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, 90)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)

    assert options_for({"model": drafter}).budget == "auto"
    with pytest.raises(ValueError, match="does nothing under model runner V2"):
        options_for({"model": drafter, "pack_target": True})


def test_runner_v1_is_refused_on_a_gpu(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, 90)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")

    with pytest.raises(NotImplementedError, match="model runner V1 on a GPU, because V2 is the default there"):
        options_for({"model": drafter})


def test_old_gpus_are_refused(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, 75)

    with pytest.raises(NotImplementedError, match="does not support GPUs below sm_80, because the kernels are"):
        options_for({"model": drafter})


def test_other_platforms_are_refused(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, has_device_capability=lambda least: False)
    monkeypatch.setattr(vllm.platforms, "current_platform", found)

    with pytest.raises(NotImplementedError, match="does not support platforms other than CPU and NVIDIA GPUs, because"):
        options_for({"model": drafter})


def test_each_unsupported_feature_has_its_check_here() -> None:
    [parametrize] = test_a_combination_that_we_do_not_do_is_refused_with_the_reason.pytestmark  # type: ignore[attr-defined]
    tested = {case[0] for case in [*parametrize.args[1], *V2_CASES]}
    tested |= {"model runner V2 without Triton", "model runner V1 on a GPU", "GPUs below sm_80"}
    tested |= {"platforms other than CPU and NVIDIA GPUs"}

    assert tested == {feature for feature, _ in UNSUPPORTED}


def test_a_worker_of_the_users_own_is_refused(drafter: str) -> None:
    arguments = engine_args({"method": "redrafter", "model": drafter})

    with pytest.raises(NotImplementedError, match=r"brings its own worker, but worker_cls is 'my\.Worker'"):
        translate(arguments, target_config(), parallel_config(worker_cls="my.Worker"))


def test_a_worker_extension_of_the_users_own_is_refused_under_v2(v2: None, drafter: str) -> None:
    arguments = engine_args({"method": "redrafter", "model": drafter})

    with pytest.raises(NotImplementedError, match=r"its own worker, but worker_extension_cls is 'my\.Extension'"):
        translate(arguments, target_config(), parallel_config(worker_extension_cls="my.Extension"))


def test_runner_v2_takes_one_more_version(v2: None, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_vllm_version", lambda: Version("0.33.1"))
    assert options_for({"model": drafter}).model == drafter

    monkeypatch.setattr(config, "_vllm_version", lambda: Version("0.34.0"))
    with pytest.raises(ValueError, match=r"vLLM 0\.34\.0 is outside the range.*>=0\.32\.0, <0\.34"):
        options_for({"model": drafter})


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "0.32.0rc1"])
def test_a_vllm_that_was_not_tested_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_vllm_version", lambda: Version(version))

    with pytest.raises(ValueError, match=rf"vLLM {version} is outside the range.*>=0\.32\.0, <0\.33"):
        options_for({"model": "anything"})


def test_the_installed_vllm_and_its_patch_releases_are_inside_the_range(
    drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.TESTED_VLLM[0] <= config._vllm_version() < config.TESTED_VLLM[1]
    monkeypatch.setattr(config, "_vllm_version", lambda: Version("0.32.7"))

    assert options_for({"model": drafter}).model == drafter


def test_a_vllm_that_was_changed_is_refused_before_the_drafter_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [ContractCheck("vllm.fine", True, "as known"), ContractCheck("vllm.Sampler.forward", False, "not there")]
    monkeypatch.setattr(patches, "check_contracts", lambda: checks)

    with pytest.raises(ValueError, match=r"\(vllm\.Sampler\.forward: not there\): run `vllm-redrafter doctor`"):
        options_for({"model": "anything"})


def test_options_can_be_read_without_vllms_arguments(drafter: str) -> None:
    assert read_options({"model": drafter, "beam_width": 2}, target_config()).beam_width == 2


# a drafter given as the model to serve


def test_a_drafter_alone_leads_to_a_directory_or_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "deep" / "target").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    for target in (str(tmp_path), "models/deep/target", "org/target", "gpt2"):
        config.check_verifier("some/drafter", target, None)


@pytest.mark.parametrize("target", [None, "", 3])
def test_a_drafter_alone_that_names_no_target_is_refused(target: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^the drafter 'some/drafter' does not say which target .*: serve the target, "
    ):
        config.check_verifier("some/drafter", target, None)


@pytest.mark.parametrize("target", ["/nowhere/target", "models/deep/target", "../target", "./target"])
def test_a_drafter_alone_whose_target_is_not_here_is_refused(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(
        ValueError, match=rf"trained for '{target}', which is no directory here .* and no Hub id: serve"
    ):
        config.check_verifier("some/drafter", target, None)


def test_a_revision_of_a_drafter_alone_is_refused_because_it_would_count_for_the_target(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"revision 'v2' was given with the drafter 'some/drafter' alone, .*: serve the"
    ):
        config.check_verifier("some/drafter", str(tmp_path), "v2")
