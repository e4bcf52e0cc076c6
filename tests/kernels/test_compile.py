from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")

ASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


@pytest.mark.slow
@pytest.mark.skipif(not ASSEMBLER.exists(), reason="this Triton brings no ptxas, which compiling needs")
def test_kernels_spill_nothing_fit_and_load_ahead(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm_redrafter.cli.main", "bench", "kernels", "--compile-only", "90"]
    # interpreted in this process, compiled in that one
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    result = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}
    )

    assert result.returncode in (0, 1), result.stderr
    compiled = json.loads(result.stdout.splitlines()[-1])["results"]
    assert {one["kernel"] for one in compiled} == {
        "attend",
        "join",
        "commit",
        "draw",
        "walk",
        "noise",
        "silu",
        "peaks",
        "choose",
        "draft",
        "store",
        "position",
        "start",
        "count",
    }
    assert [one for one in compiled if one["binary"]["spilled_bytes"] > 0] == []
    assert all(one["binary"]["registers"] > 0 for one in compiled)
    # what a program on an H100 can have
    assert all(one["binary"]["shared_bytes"] <= 227 * 1024 for one in compiled)
    # keys, values and block numbers of the next tile, at the least, while one is worked on
    assert all(one["binary"]["loads_ahead"] >= 3 for one in compiled if one["kernel"] == "attend")
