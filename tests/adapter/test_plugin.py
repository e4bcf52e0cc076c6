from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from vllm_redrafter.adapter import patches, plugin


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    found = [each for each in metadata.entry_points(group="vllm.general_plugins") if each.name == "redrafter"]
    if not found:
        pytest.skip("vllm-redrafter is not installed in this environment")

    assert {each.load() for each in found} == {plugin.register}


def test_importing_the_plugin_imports_nothing_heavy() -> None:
    code = "import sys, vllm_redrafter.adapter.plugin; print({'torch', 'vllm', 'transformers'} & {*sys.modules})"

    assert run_python(code).strip() == "set()"


def test_registering_does_not_raise_where_vllm_is_missing_or_hollow() -> None:
    missing = "import sys; sys.modules['vllm'] = None\n"
    hollow = (
        "import sys, types\n"
        "for name in ('vllm', 'vllm.engine', 'vllm.engine.arg_utils', 'vllm.sampling_params'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = []\n"
    )
    for prepare in (missing, hollow):
        code = "from vllm_redrafter.adapter.plugin import register; register(); register(); print('alive')"

        assert run_python(prepare + code).strip() == "alive"


def test_registering_does_not_raise_whatever_a_module_of_vllm_raises(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    for patch in patches.PATCHES:
        module = tmp_path.joinpath(*patch.module.split(".")).with_suffix(".py")
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text("import builtins; builtins.imported += 1; raise builtins.broken")
    code = (
        f"import builtins, sys; sys.path.insert(0, {str(tmp_path)!r}); builtins.imported = 0\n"
        "from vllm_redrafter.adapter.plugin import register\n"
        "for builtins.broken in (RuntimeError, AttributeError, OSError, ValueError, KeyError, AssertionError):\n"
        "    register()\n"
        "print(builtins.imported)"
    )

    assert int(run_python(code)) == 6 * len(patches.PATCHES)


def test_a_vllm_that_has_renamed_what_we_hook_into_is_refused_by_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    monkeypatch.delattr(EngineArgs, "create_speculative_config")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    arguments = EngineArgs(str(tmp_path), speculative_config={"method": "redrafter", "model": "a/drafter"})

    with pytest.raises(ValueError, match=r"EngineArgs\.create_speculative_config: not there.*vllm-redrafter doctor"):
        arguments.create_engine_config()


def test_registering_again_changes_nothing() -> None:
    def installed() -> list[object]:
        return [getattr(patches._find(patch.module, patch.owner), patch.name) for patch in patches.PATCHES]

    plugin.register()
    before = installed()
    plugin.register()

    assert installed() == before
    assert [function._redrafter_patch for function in before] == list(patches.PATCHES)  # type: ignore[attr-defined]
