"""Real vLLM engines for tests, each in a child process that answers one workload at a time.

A child imports vLLM once and builds engines one after another, so a new engine costs seconds and only the first one
of an environment costs half a minute. Children with and without the plugin are different processes. Results are
cached by engine and workload: tests share them by asking for the same thing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]

WHEN_IDLE = 1_000_000


def python_path(*first: str | Path) -> str:
    """Return a PYTHONPATH for a process: these, and what the tests themselves were given, such as another vLLM."""
    return os.pathsep.join([*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])])


ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": python_path(ROOT),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # engine and worker in the child itself: a test may then patch the worker, and one import is saved
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}
OPTIONS = {
    "block_size": 32,
    "disable_log_stats": False,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 8,
    # what the tiny targets need: a GiB of zeros takes longer than the test
    "num_gpu_blocks_override": 512,
    "seed": 0,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


@dataclass(frozen=True)
class Engine:
    """What an engine is made of; equal ones share their results."""

    target: str
    drafter: str | None = None
    """None for vLLM without the plugin, in a process of its own."""
    speculation: Mapping[str, Any] = field(default_factory=dict)
    """More of `speculative_config`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of `LLM` on top of `OPTIONS`; None takes one of those away."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """On top of `ENVIRONMENT`."""

    def keywords(self) -> dict[str, Any]:
        """Return the keywords of `LLM`."""
        keywords = {name: value for name, value in {**OPTIONS, **self.options}.items() if value is not None}
        if self.drafter is not None:
            keywords["speculative_config"] = {"method": "redrafter", "model": self.drafter, **self.speculation}
        return {"model": self.target, **keywords}

    def variables(self) -> dict[str, str]:
        """Return the environment variables of its process."""
        plugins = "redrafter" if self.drafter is not None else ""
        return {**ENVIRONMENT, "VLLM_PLUGINS": plugins, **self.environment}


@dataclass(frozen=True)
class Request:
    """A prompt and what to do with it."""

    prompt: Sequence[int] | str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of `SamplingParams`; `structured_outputs` holds those of `StructuredOutputsParams`."""
    add_after: int = 0
    """Engine steps before it is handed in; it is sooner if the engine has nothing left to do, so `WHEN_IDLE` waits for
    all that was handed in before."""
    abort_after: int | None = None
    """Engine steps from then on until it is aborted."""
    lora: str | None = None
    """Directory of a LoRA adapter."""


@dataclass(frozen=True)
class Workload:
    """Requests that run together, on an engine with an empty prefix cache."""

    requests: Sequence[Request]
    mutation: str | None = None
    """A function of `tests.engine.mutations` that breaks the adapter for the time of this workload; "v2.name" is one of
    `tests.engine.v2.mutations`."""


@dataclass(frozen=True)
class Result:
    """What a workload yielded."""

    answers: list[dict[str, Any] | None]
    """Per request, None where it was aborted: `outputs` (one dict per sample with `token_ids`, `text`, `logprobs`,
    `finish_reason`, `stop_reason`), `prompt_logprobs` and `num_cached_tokens`. Log-probabilities are lists with one
    {token id as text: log-probability} per position."""
    stats: dict[str, Any]
    """What `redrafter_stats` counted during the workload; empty without drafter."""
    metrics: dict[str, float]
    """What vLLM's own counters counted during the workload, by their names."""
    num_engine_steps: int
    seconds: float
    has_plugin: bool
    """Whether anything of ours was imported in the engine's process."""
    is_async: bool
    """Whether steps are scheduled before the ones before them have ended."""
    num_head_rows: list[int]
    """By rank, the rows of the drafter's head that it holds, under model runner V2; else empty."""
    num_graph_replays: int
    """CUDA graphs that were replayed, as `v2.recorded_graphs` does: of whole forwards, and of drafts."""
    num_piece_replays: int
    """The same of those that hold what lies between two layers' attention."""

    def token_ids(self) -> list[list[list[int]] | None]:
        """Return the tokens of every sample of every request."""
        return [answer and [output["token_ids"] for output in answer["outputs"]] for answer in self.answers]

    def texts(self) -> list[list[str] | None]:
        """Return the text of every sample of every request."""
        return [answer and [output["text"] for output in answer["outputs"]] for answer in self.answers]

    def finish_reasons(self) -> list[list[Any] | None]:
        """Return why every sample of every request ended."""
        return [
            answer and [(output["finish_reason"], output["stop_reason"]) for output in answer["outputs"]]
            for answer in self.answers
        ]


def assert_same_answers(drafted: Result, plain: Result) -> None:
    """Compare tokens, texts and reasons of all requests, and say where the first difference is."""
    for index, (ours, theirs) in enumerate(zip(drafted.answers, plain.answers, strict=True)):
        assert (ours is None) == (theirs is None), f"request {index} was aborted in one run only"
        if ours is None or theirs is None:
            continue
        for number, (sample, expected) in enumerate(zip(ours["outputs"], theirs["outputs"], strict=True)):
            where = f"request {index}, sample {number}"
            tokens, expected_tokens = sample["token_ids"], expected["token_ids"]
            same = [ours == theirs for ours, theirs in zip(tokens, expected_tokens, strict=False)]
            first = same.index(False) if False in same else len(same)
            assert tokens == expected_tokens, (
                f"{where}: token {first} differs: {tokens[first:]}, {expected_tokens[first:]}"
            )
            for name in ("text", "finish_reason", "stop_reason"):
                assert sample[name] == expected[name], f"{where}: {name} is {sample[name]!r}, not {expected[name]!r}"


class EngineError(Exception):
    """An engine could not be built or died; the message ends with the tail of its log."""


class EnginePool:
    """The engines of a test session; `close` ends their processes.

    Args:
        log_directory: takes one log per process.
        max_processes: the one unused for longest makes room for a new one.
    """

    def __init__(self, log_directory: Path, max_processes: int = 3) -> None:
        self._log_directory = log_directory
        self._max_processes = max_processes
        self._processes: dict[str, _Child] = {}
        self._results: dict[str, Result] = {}
        self._num_started = 0

    def run(self, engine: Engine, workload: Workload | Sequence[Request]) -> Result:
        """Return what an engine makes of a workload, run at the first call and remembered.

        Raises:
            EngineError: the engine refused its configuration, or failed.
        """
        if not isinstance(workload, Workload):
            workload = Workload(workload)
        engine_key = json.dumps([engine.keywords(), engine.variables()], sort_keys=True)
        key = json.dumps([engine_key, asdict(workload)], sort_keys=True)
        if key not in self._results:
            child = self._child(engine.variables())
            try:
                answer = child.ask({"keywords": engine.keywords(), "workload": asdict(workload)})
            except EngineError:
                self._end(child)
                raise
            self._results[key] = Result(**answer)
        return self._results[key]

    def close(self) -> None:
        """End all processes."""
        for child in list(self._processes.values()):
            self._end(child)

    def _child(self, variables: dict[str, str]) -> _Child:
        key = json.dumps(variables, sort_keys=True)
        if key in self._processes:
            # the last one is the one used last
            self._processes[key] = self._processes.pop(key)
            return self._processes[key]
        if len(self._processes) >= self._max_processes:
            self._end(next(iter(self._processes.values())))
        self._num_started += 1
        child = _Child(variables, self._log_directory / f"engine_{self._num_started}.log")
        self._processes[key] = child
        return child

    def _end(self, child: _Child) -> None:
        self._processes = {key: other for key, other in self._processes.items() if other is not child}
        child.end()


class _Child:
    """One process of `engine_worker`: JSON lines on its standard input, answers on a pipe of their own."""

    def __init__(self, variables: dict[str, str], log: Path) -> None:
        self._log = log
        read_end, write_end = os.pipe()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.engine.engine_worker", str(write_end)],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(write_end,),
                text=True,
                # its own group, so that its engine core ends with it
                start_new_session=True,
            )
        os.close(write_end)
        self._answers: TextIO = os.fdopen(read_end, encoding="utf-8")

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(f"the engine's process died\n{self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{answer['error']}\n{self._tail()}")
        return answer

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._answers.close()

    def _tail(self, num_lines: int = 40) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"--- end of {self._log}", *lines[-num_lines:]])
