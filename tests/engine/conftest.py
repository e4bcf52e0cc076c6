from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch

from tests.engine import tiny_models
from tests.engine.engine_process import Engine, EnginePool

FIXED = {"budget": "fixed"}
# one rank per core at most, wherever the system puts it
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class TinyPair(NamedTuple):
    """Directories of a tiny target and its drafters, and prompts that the trained one has heard the target continue."""

    target: str
    drafter: str
    random_drafter: str
    prompts: list[list[int]]

    def plain(self, **options: Any) -> Engine:
        """Return vLLM without the plugin, `LLM`'s keywords on top.

        It gets prompts whole: seeds and chunked prefill together kill stock vLLM on a CPU, and its tokens do not
        depend on the chunks.
        """
        return Engine(self.target, options={"max_num_batched_tokens": 8192, **options})

    def drafted(self, speculation: Mapping[str, Any] = FIXED, *, drafter: str | None = None, **options: Any) -> Engine:
        """Return vLLM with the trained drafter, or another, prompts in chunks of at most 128 tokens."""
        return Engine(self.target, drafter or self.drafter, speculation, options)


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePool]:
    """The engines of this session."""
    pool = EnginePool(tmp_path_factory.mktemp("engine_logs"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A tiny Llama (fp32, two layers, grouped heads, untied) with a trained and a useless drafter."""
    directory = tmp_path_factory.mktemp("tiny_pair")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = tiny_models.make_llama()
    prompts = tiny_models.token_prompts()
    pair = TinyPair(
        tiny_models.save_target(model, directory / "target"),
        tiny_models.save_trained_drafter(model, directory / "drafter", prompts),
        tiny_models.save_random_drafter(model, directory / "random_drafter"),
        prompts,
    )
    torch.set_num_threads(num_threads)
    return pair
