from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch

from tests.engine import tiny_models
from tests.engine.engine_process import ROOT, Engine, python_path

SITE = '''"""Lets Triton interpret kernels in this process; vLLM asks for a backend before it makes any of its own."""
import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
'''
OPTIONS = {
    # refused where vLLM does not know a method to be fit for it
    "async_scheduling": True,
    "max_model_len": 256,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 64,
}
PROMPT_LENGTHS = (3, 31, 32, 90)
NUM_NODES = 8


class V2Pair(NamedTuple):
    """A tiny target and its drafter, served by model runner V2 under Triton's interpreter."""

    target: str
    drafter: str
    prompts: list[list[int]]
    environment: Mapping[str, str]

    def plain(self, **options: Any) -> Engine:
        """Return vLLM without the plugin, on the same runner and attention backend."""
        return Engine(self.target, options={**OPTIONS, **options}, environment=self.environment)

    def drafted(self, speculation: Mapping[str, Any] | None = None, **options: Any) -> Engine:
        """Return vLLM with the drafter, and trees of one size unless something else is asked for."""
        wanted = {"num_speculative_tokens": NUM_NODES, "budget": "fixed", **(speculation or {})}
        return Engine(self.target, self.drafter, wanted, {**OPTIONS, **options}, self.environment)


@pytest.fixture(scope="session")
def v2_environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What makes a process run model runner V2 on a CPU."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE)
    # the processes of several ranks know of a plugin only
    plugin = site / "stand_ins-1.0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: stand_ins\nVersion: 1.0\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nstand_ins = tests.engine.v2.stand_ins:register\n")
    return {
        "ENGINE_SETUP": "tests.engine.v2.stand_ins",
        "PYTHONPATH": python_path(site, ROOT),
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }


@pytest.fixture(scope="session")
def v2_pair(tmp_path_factory: pytest.TempPathFactory, v2_environment: Mapping[str, str]) -> V2Pair:
    """A tiny Llama with heads of a size that the kernels know, and a drafter that has heard it continue the prompts."""
    directory = tmp_path_factory.mktemp("v2_pair")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = tiny_models.make_llama(head_dim=64)
    prompts = tiny_models.token_prompts(PROMPT_LENGTHS)
    pair = V2Pair(
        tiny_models.save_target(model, directory / "target"),
        tiny_models.save_trained_drafter(model, directory / "drafter", prompts, num_steps=250),
        prompts,
        v2_environment,
    )
    torch.set_num_threads(num_threads)
    return pair
