"""The examples as a user runs them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
DRAFTER = EXAMPLES / "models" / "drafter"
PROGRAMS = ("offline", "serve_and_client", "load_from_hub", "verify_your_pair", "train_a_drafter")

on_an_engine = [
    pytest.mark.engine,
    pytest.mark.skipif(not DRAFTER.is_dir(), reason="the example pair is not there"),
]


def run(name: str, *arguments: str, **environment: str) -> str:
    """Returns what the example printed."""
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        # engines of a program that ends at once need no process of their own, which would double the time to start
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_example_fits_on_a_page(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


@pytest.mark.slow
def test_a_drafter_is_trained_in_a_few_lines(tmp_path: Path) -> None:
    out = run("train_a_drafter", str(EXAMPLES / "models" / "target"), "", str(tmp_path / "drafter"))

    found = re.search(r": 20 steps, (\d\.\d\d) tokens per verification", out)
    assert found
    assert float(found[1]) >= 1
    assert (tmp_path / "drafter" / "model.safetensors").is_file()


class TestOnAnEngine:
    pytestmark = on_an_engine

    def test_offline_takes_fewer_steps_than_tokens(self) -> None:
        found = re.search(r"(\d+) tokens in (\d+) decode steps", run("offline"))

        assert found
        assert int(found[1]) > int(found[2]) > 0

    def test_a_served_completion_streams_and_is_counted(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        lines = run("serve_and_client", PORT=str(port)).splitlines()

        assert re.fullmatch(r"vllm:spec_decode_num_accepted_tokens_total\{.*\} [1-9]\d*\.0", lines[-1])
        assert len("".join(lines[:-1])) > 20

    def test_a_drafter_comes_from_the_hub_s_cache(self, tmp_path: Path) -> None:
        # what a download leaves behind; offline, so that only the cache can be read
        commit = hashlib.sha1(b"example").hexdigest()
        repository = tmp_path / "hub" / "models--someone--drafter"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "v1").write_text(commit)
        shutil.copytree(DRAFTER, repository / "snapshots" / commit)

        out = run(
            "load_from_hub",
            *(str(EXAMPLES / "models" / "target"), "someone/drafter", "--revision", "v1"),
            HF_HOME=str(tmp_path),
            HF_HUB_OFFLINE="1",
        )

        assert "someone/drafter: " in out
        assert len(out[out.index("A list is") :]) > 40

    def test_verify_your_pair_finds_all_answers_identical(self) -> None:
        assert "8 of 8 answers are identical" in run("verify_your_pair")
