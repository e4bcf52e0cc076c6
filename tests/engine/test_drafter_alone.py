"""vLLM started with the drafter as its model finds the target, and the method, by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.engine.engine_process import ROOT, Engine, EngineError, EnginePool, Request, assert_same_answers

MODELS = ROOT / "examples" / "models"
GREEDY = {"temperature": 0, "max_tokens": 48}
REQUESTS = [Request("A list is", GREEDY), Request("If the argument", {"temperature": 1, "seed": 3, "max_tokens": 48})]
# the plugin, and no request for it: the drafter's own config is what asks
PLUGIN = {"VLLM_PLUGINS": "redrafter"}

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not (MODELS / "drafter").is_dir(), reason="the example pair is not there"),
]


def copy_drafter(directory: Path, verifier: str) -> str:
    """Copies the example drafter and lets it name another target."""
    shutil.copytree(MODELS / "drafter", directory)
    fields = json.loads((directory / "config.json").read_text())
    fields["verifier"] = fields["speculators_config"]["verifier"]["name_or_path"] = verifier
    (directory / "config.json").write_text(json.dumps(fields))
    return str(directory)


def test_a_drafter_alone_serves_its_target_with_the_targets_text(engines: EnginePool, tmp_path: Path) -> None:
    target = str(MODELS / "target")
    drafter = copy_drafter(tmp_path / "drafter", target)
    options = {"max_num_batched_tokens": 512}

    alone = engines.run(Engine(drafter, environment=PLUGIN, options=options), REQUESTS)

    assert_same_answers(alone, engines.run(Engine(target, options=options), REQUESTS))
    assert alone.metrics["vllm:spec_decode_num_accepted_tokens"] > 0


def test_a_drafter_alone_whose_target_is_not_there_is_refused_in_one_sentence(
    engines: EnginePool, tmp_path: Path
) -> None:
    drafter = copy_drafter(tmp_path / "drafter", "models/of/another/machine")

    with pytest.raises(EngineError, match="was trained for 'models/of/another/machine', which is no directory here"):
        engines.run(Engine(drafter, environment=PLUGIN), REQUESTS)
