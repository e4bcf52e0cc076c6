"""A vLLM engine in a process of its own, spoken to in JSON lines.

vLLM prints to stdout and changes process-wide state; in a child its output goes to a log file and our stdout stays
ours. The child has a session of its own: Ctrl-C reaches us alone, and we end the child with all of its processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from vllm_redrafter import bootstrap
from vllm_redrafter.cli.engine_log import read_reason
from vllm_redrafter.cli.errors import CommandError
from vllm_redrafter.cli.generation import Answer, Generation, Prompt

CHILD_COMMAND = (sys.executable, "-m", "vllm_redrafter.cli.engine_child")
_DEFAULT_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # the child already is a process of its own: one more would double the time to start
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
_CLOSE_SECONDS = 15

OnPiece = Callable[[str, bool], None]
OnAnswer = Callable[[int, Answer], None]


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is started with."""

    target: str
    """Directory or Hub id of the target."""
    speculative_config: dict[str, Any] | None
    """As vLLM takes it, or None for the target alone."""
    dtype: str = "float32"
    max_num_seqs: int = 1
    """Most requests that run at once."""
    enable_chunked_prefill: bool = True
    """False where seeds are used: vLLM's CPU runner dies of a seeded request whose prompt comes in chunks."""
    max_model_len: int | None = None
    """Most tokens of prompt and answer together; the target's own limit by default."""


class Engine:
    """An engine: a context manager that starts it, waits until it takes prompts, and ends it with all its processes.

    Raises:
        CommandError: on entering, the engine ended instead; the message carries its reason and the path of its log.
    """

    def __init__(self, spec: EngineSpec, *, verbose: bool = False) -> None:
        self._verbose = verbose
        self._process: subprocess.Popen[str] | None = None
        self._events: IO[str] | None = None
        self._log: Path | None = None
        self._spec = spec
        self._died = False

    def __enter__(self) -> Engine:
        try:
            self.spawn()
            self.wait_ready()
        except BaseException:
            self._close(at_once=True)
            raise
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *rest: object) -> None:
        self._close(at_once=exception_type is not None)

    def spawn(self) -> None:
        """Start the child process without waiting for it: for who starts several, and sees to `__exit__`."""
        if self._verbose:
            log = os.dup(2)
        else:
            log, name = tempfile.mkstemp(prefix="vllm-redrafter-", suffix=".log")
            self._log = Path(name)
        environment = {**_DEFAULT_ENVIRONMENT, **os.environ}
        environment.setdefault("VLLM_LOGGING_LEVEL", "INFO" if self._verbose else "ERROR")
        events, child_events = os.pipe()
        self._process = subprocess.Popen(
            [*CHILD_COMMAND, str(child_events)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[child_events],
            env=environment,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        os.close(child_events)
        os.close(log)
        self._events = os.fdopen(events, encoding="utf-8")
        self._send(asdict(self._spec))

    def wait_ready(self) -> None:
        """Return when the engine takes prompts.

        Raises:
            CommandError: it ended instead.
        """
        self._receive()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: dict[str, Any],
        *,
        on_piece: OnPiece | None = None,
        on_answer: OnAnswer | None = None,
    ) -> Generation:
        """Return the answers to `prompts`, which run together as far as `max_num_seqs` allows.

        Args:
            prompts: a prompt's own seed replaces that of `sampling`.
            sampling: keyword arguments of vLLM's `SamplingParams`.
            on_piece: called with each token's text as it comes, and whether the token was drafted.
            on_answer: called with a prompt's index and its answer when that is complete.

        Raises:
            CommandError: the engine died.
        """
        self._send(
            {
                "command": "generate",
                "prompts": [prompt.as_dict() for prompt in prompts],
                "sampling": sampling,
                "stream": on_piece is not None,
            }
        )
        answers: dict[int, Answer] = {}
        while (event := self._receive())["event"] != "done":
            if event["event"] == "pieces":
                for text, drafted in event["pieces"]:
                    if on_piece is not None:
                        on_piece(text, drafted)
            else:
                answers[event["index"]] = Answer(**event["answer"])
                if on_answer is not None:
                    on_answer(event["index"], answers[event["index"]])
        return Generation([answers[index] for index in range(len(prompts))], event["seconds"], event["stats"])

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of token sequences, special tokens written out."""
        self._send({"command": "decode", "sequences": sequences})
        texts: list[str] = self._receive()["texts"]
        return texts

    def _close(self, *, at_once: bool) -> None:
        """End the engine and everything it started; its log is kept where it died by itself."""
        process, events = self._process, self._events
        if process is None or process.stdin is None or events is None:
            return
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            if not at_once:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_CLOSE_SECONDS)
        finally:
            # the whole session: workers outlive a parent that was killed
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            events.close()
            if self._log is not None and not self._died:
                self._log.unlink(missing_ok=True)
            self._process = None

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _receive(self) -> dict[str, Any]:
        assert self._events is not None
        line = self._events.readline()
        if not line.endswith("\n"):
            raise self._death()
        event: dict[str, Any] = json.loads(line)
        return event

    def _death(self) -> CommandError:
        assert self._process is not None
        self._died = True
        status = self._process.wait()
        how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        if self._log is None:
            return CommandError(f"the engine for {self._spec.target!r} ended {how}: see its log above")
        reason = read_reason(self._log)
        if missing := bootstrap.missing_packages():
            how += f" on a machine that lacks what vLLM needs on CPUs (`apt install {' '.join(missing)}`)"
        ended = f"the engine for {self._spec.target!r} ended {how}"
        if reason is None:
            return CommandError(f"{ended}: see its log, {self._log}")
        return CommandError(f"{reason} ({ended}, its log is {self._log})")
