"""What is wrong is said by `LLM(...)` in one sentence, within seconds; who does not ask for us gets vLLM as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine import tiny_models
from tests.engine.architectures import make_gpt2
from tests.engine.engine_process import ENVIRONMENT, OPTIONS, ROOT
from vllm_redrafter.core.checkpoint import save_drafter
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

pytestmark = pytest.mark.engine

MOST_SECONDS = 20
"""Of an engine's start, importing vLLM not counted; a worker alone takes longer on a busy machine."""

REFUSE = """
import json, multiprocessing, sys, time
from vllm import LLM
reports = []
for keywords in json.load(sys.stdin):
    started = time.perf_counter()
    try:
        LLM(**keywords)
        raise SystemExit(f"not refused: {keywords}")
    except (NotImplementedError, ValueError) as error:
        reports.append([type(error).__name__, str(error), time.perf_counter() - started])
    assert not multiprocessing.active_children(), "a process was started"
print(json.dumps(reports))
"""

# vLLM looks at a class that is new to it in a process of its own, which imports vLLM again for each
INSPECT_HERE = """
from vllm.model_executor.models import registry
registry._run_in_subprocess = lambda inspect: inspect()
"""

DESCRIBE = """
import json, re, sys
from vllm.engine.arg_utils import EngineArgs
reports = []
for keywords in json.load(sys.stdin):
    config = EngineArgs(**keywords).create_engine_config()
    text = repr(config).replace(config.instance_id, "instance")
    reports.append([re.sub(r" at 0x[0-9a-f]+", "", text), config.compute_hash()])
print(json.dumps([reports, "vllm_redrafter.adapter.patches" in sys.modules]))
"""


M_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
REFUSED_TARGETS: list[tuple[str, str, str, dict[str, Any]]] = [
    (
        "MLA (DeepSeek-like) targets",
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        {"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    ),
    ("Mamba, linear-attention and hybrid targets", "Mamba2ForCausalLM", "mamba2", {"num_heads": 4, "state_size": 16}),
    ("Mamba, linear-attention and hybrid targets", "JambaForCausalLM", "jamba", {}),
    (
        "M-RoPE and multimodal targets",
        "PaddleOCRVLForConditionalGeneration",
        "paddleocr_vl",
        {"text_config": {**tiny_models.LLAMA, "model_type": "paddleocr_vl_text", "rope_parameters": M_ROPE}},
    ),
    (
        "M-RoPE and multimodal targets",
        "PaliGemmaForConditionalGeneration",
        "paligemma",
        {"text_config": {**tiny_models.LLAMA, "model_type": "gemma"}},
    ),
    (
        "encoder-decoder targets",
        "WhisperForConditionalGeneration",
        "whisper",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "max_target_positions": 512},
    ),
    (
        "cross-layer KV sharing",
        "Gemma3nForCausalLM",
        "gemma3n_text",
        {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2},
    ),
    ("chunked local attention", "Llama4ForCausalLM", "llama4_text", {"attention_chunk_size": 64}),
]
"""What is not supported, an architecture that has it, and what its config.json holds besides a Llama's sizes."""


def run_python(program: str, argument: object, **environment: str) -> Any:
    variables = {name: value for name, value in ENVIRONMENT.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(argument),
        env={**os.environ, **variables, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save_target(tiny_models.make_llama(), tmp_path_factory.mktemp("target"))


def test_wrong_requests_are_refused_in_one_sentence_before_any_process_starts(target: str, tmp_path: Path) -> None:
    model = tiny_models.make_llama()
    good = tiny_models.save_random_drafter(model, tmp_path / "good")
    wider = ReDrafter(ReDrafterConfig(hidden_size=96, vocab_size=tiny_models.VOCAB_SIZE))
    save_drafter(wider, tmp_path / "wider")
    fused = tiny_models.save_random_drafter(model, tmp_path / "fused", fused_layers=[0, 1])
    gpt2 = tiny_models.save_target(make_gpt2(), tmp_path / "gpt2")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes(Path(good, "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    cases: list[tuple[dict[str, Any], dict[str, Any], str, tuple[str, ...]]] = [
        ({"beam_widht": 3}, {}, "ValueError", ("'beam_widht'", "did you mean 'beam_width'?")),
        ({"model": str(tmp_path / "absent")}, {}, "ValueError", (str(tmp_path / "absent"),)),
        ({"model": str(tmp_path / "wider")}, {}, "ValueError", ("hidden_size 96", "64")),
        ({"model": str(pickled)}, {}, "ValueError", ("safetensors",)),
        ({"model": target}, {}, "ValueError", ("llama", "not a ReDrafter drafter")),
        ({"num_speculative_tokens": 64}, {}, "ValueError", ("64", "63")),
        ({"beam_width": 0}, {}, "ValueError", ("beam_width is 0", "at least 1")),
        (
            {"model": fused},
            {"model": gpt2},
            "NotImplementedError",
            ("vLLM's GPT2LMHeadModel does not hand out", "0, 1"),
        ),
        ({}, {"pipeline_parallel_size": 2}, "NotImplementedError", ("pipeline parallelism", "without speculation")),
    ]

    reports = run_python(
        REFUSE,
        [
            {**OPTIONS, "model": target, "speculative_config": {"method": "redrafter", "model": good, **wrong}, **more}
            for wrong, more, _, _ in cases
        ],
    )

    for (wrong, more, kind, parts), (name, message, seconds) in zip(cases, reports, strict=True):
        assert name == kind, f"{wrong} {more}: {message}"
        assert all(part in message for part in parts), message
        assert "\n" not in message
        assert seconds < MOST_SECONDS


def test_what_is_not_supported_is_found_in_the_configs_of_real_architectures_and_in_real_options(
    target: str, tmp_path: Path
) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("decode context parallelism", {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}),
        ("KV connectors", {"kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}}),
        ("KV connectors", {"kv_offloading_size": 0.5}),
    ]
    for feature, architecture, model_type, fields in REFUSED_TARGETS:
        content = {**tiny_models.LLAMA, "architectures": [architecture], "model_type": model_type, **fields}
        (tmp_path / architecture).mkdir()
        (tmp_path / architecture / "config.json").write_text(json.dumps(content))
        cases.append((feature, {"model": str(tmp_path / architecture)}))
    request = {"speculative_config": {"method": "redrafter", "model": "a/drafter"}}

    reports = run_python(INSPECT_HERE + REFUSE, [{**OPTIONS, "model": target, **request, **more} for _, more in cases])

    for (feature, more), (name, message, _) in zip(cases, reports, strict=True):
        assert name == "NotImplementedError", f"{more}: {message}"
        assert message.startswith(f"redrafter does not support {feature}, because "), f"{more}: {message}"


def test_who_does_not_ask_for_the_drafter_gets_the_config_of_a_vllm_without_the_plugin(target: str) -> None:
    prompt_lookup = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    keywords = [{"model": target, **OPTIONS}, {"model": target, **OPTIONS, "speculative_config": prompt_lookup}]

    with_plugin, is_loaded = run_python(DESCRIBE, keywords)
    without_plugin, is_loaded_without = run_python(DESCRIBE, keywords, VLLM_PLUGINS="")

    assert is_loaded
    assert not is_loaded_without
    assert with_plugin == without_plugin
