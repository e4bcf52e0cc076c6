from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate as stock_generate

from mlx_port import server
from tests.mlx_port.test_stream import PROMPTS, make_pair
from tests.mlx_port.twins import EXAMPLE, save_random

ROOT = EXAMPLE.parents[1]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yields the address of a server of the example pair."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_port.server", "--model", str(EXAMPLE / "target")]
    command += ["--drafter", str(EXAMPLE / "drafter"), "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _complete(url: str, **fields: object) -> dict:
    body = json.dumps({"prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0, **fields}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_a_served_text_is_mlx_lms(url: str) -> None:
    pair = make_pair()
    pair.target.model.set_dtype(mx.bfloat16)
    expected = stock_generate(pair.target.model, pair.tokenizer, PROMPTS[0], max_tokens=16)
    pair.target.model.set_dtype(mx.float32)

    # the second answer continues from the first one's caches
    answers = [_complete(url) for _ in range(2)]

    assert [answer["choices"][0]["text"] for answer in answers] == [expected] * 2
    assert answers[0]["usage"]["completion_tokens"] == 16


def test_a_served_text_ends_before_a_stop_word(url: str) -> None:
    whole = _complete(url)["choices"][0]["text"]
    tokenizer = make_pair().tokenizer
    # mlx-lm 0.28 finds a stop word by its tokens
    words = [tokenizer.decode([token_id]) for token_id in tokenizer.encode(whole, add_special_tokens=False)]
    stop = next(word for word in words[4:] if len(tokenizer.encode(word, add_special_tokens=False)) == 1)

    answer = _complete(url, stop=[stop])["choices"][0]

    assert (answer["text"], answer["finish_reason"]) == (whole.partition(stop)[0], "stop")


def test_the_served_drafter_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair()
    handle, tokenizer = server.load(str(EXAMPLE / "drafter"))
    prompt = pair.tokenizer.encode(PROMPTS[0])

    responses = list(
        server.stream(
            model=pair.target.model,
            tokenizer=pair.tokenizer,
            prompt=prompt,
            draft_model=handle,
            num_draft_tokens=3,
            max_tokens=16,
        )
    )

    assert (tokenizer.vocab_size, handle.make_cache()) == (2048, [])
    assert any(response.from_draft for response in responses)
    assert handle.beside(pair.target.model) is handle.beside(pair.target.model)


def test_what_is_no_drafter_is_left_to_mlx_lm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    monkeypatch.setattr(server, "_stock_load", calls.append)

    server.load(str(EXAMPLE / "target"))
    server.load("some/model")

    assert calls == [str(EXAMPLE / "target"), "some/model"]
    assert isinstance(server.load(str(save_random(tmp_path)))[0], server.ServedDrafter)
