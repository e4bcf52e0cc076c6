from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import FakePair
from vllm_redrafter import bootstrap
from vllm_redrafter.cli.engine import Engine, EngineSpec
from vllm_redrafter.cli.errors import CommandError
from vllm_redrafter.cli.generation import Answer, Prompt


def wait_until_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_answers_come_in_the_order_of_their_prompts_and_pieces_as_they_are_said(fake_pair: FakePair) -> None:
    target, _ = fake_pair()
    pieces: list[tuple[str, bool]] = []
    finished: dict[int, Answer] = {}

    with Engine(EngineSpec(target, None)) as engine:
        generation = engine.generate(
            [Prompt("a b"), Prompt("c")],
            {"max_tokens": 3, "temperature": 0.0},
            on_piece=lambda text, drafted: pieces.append((text, drafted)),
            on_answer=lambda index, answer: finished.update({index: answer}),
        )
        texts = engine.decode([[0, 2], [1]])

    assert [answer.text for answer in generation.answers] == ["a b a", "c c c"]
    assert pieces == [("a ", False), ("b ", True), ("a ", False), ("c ", False), ("c ", True), ("c ", False)]
    assert finished == dict(enumerate(generation.answers))
    assert texts == ["a c", "b"]


def test_the_log_goes_with_an_engine_that_ends_well(
    fake_pair: FakePair, leftover_logs: Callable[[], list[Path]], tmp_path: Path
) -> None:
    target, _ = fake_pair(pid_file=str(tmp_path / "pid"))

    with Engine(EngineSpec(target, None)):
        assert len(leftover_logs()) == 1

    assert leftover_logs() == []
    assert wait_until_gone(int((tmp_path / "pid").read_text()))


def test_an_engine_that_dies_says_why_and_where_its_log_is(
    fake_pair: FakePair, leftover_logs: Callable[[], list[Path]]
) -> None:
    target, _ = fake_pair(dies_after=1)

    with Engine(EngineSpec(target, None)) as engine, pytest.raises(CommandError) as death:
        engine.generate([Prompt("a"), Prompt("b")], {"max_tokens": 1, "temperature": 0.0})

    (log,) = leftover_logs()
    assert str(death.value) == f"out of paper (the engine for {target!r} ended with status 1, its log is {log})"
    assert log.read_text() == "RuntimeError: out of paper\n"


def test_an_engine_that_never_starts_is_reported_without_a_reason_if_its_log_has_none(fake_pair: FakePair) -> None:
    target, _ = fake_pair(log="Killed")

    with pytest.raises(CommandError, match=r"ended with status 1: see its log"), Engine(EngineSpec(target, None)):
        pass


def test_where_the_machine_lacks_what_vllm_needs_an_engine_that_dies_says_so(
    fake_pair: FakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _ = fake_pair(log="Killed")
    monkeypatch.setattr(bootstrap, "missing_libraries", lambda: ["libnuma1"])
    monkeypatch.setattr(bootstrap, "missing_build_tools", lambda: ["g++"])

    with pytest.raises(CommandError, match=r"needs on CPUs \(`apt install libnuma1 g\+\+`\): see its log"):
        Engine(EngineSpec(target, None)).__enter__()


def test_an_exception_ends_the_engine_at_once_and_leaves_no_log(
    fake_pair: FakePair, leftover_logs: Callable[[], list[Path]], tmp_path: Path
) -> None:
    target, _ = fake_pair(hangs=True, pid_file=str(tmp_path / "pid"))

    def interrupt(index: int, answer: Answer) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Engine(EngineSpec(target, None)) as engine:
        engine.generate([Prompt("a")], {"max_tokens": 1, "temperature": 0.0}, on_answer=interrupt)

    assert time.monotonic() - started < 10
    assert wait_until_gone(int((tmp_path / "pid").read_text()))
    assert leftover_logs() == []


def test_an_engine_gets_small_defaults_that_the_environment_overrides(
    fake_pair: FakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _ = fake_pair()
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)

    with Engine(EngineSpec(target, None)) as engine:
        assert engine._process is not None
        environment = Path(f"/proc/{engine._process.pid}/environ").read_text()

    assert set(re.findall(r"VLLM_(?:CPU_KV|ENABLE_V1|LOGGING)\w+=\w+", environment)) == {
        "VLLM_CPU_KVCACHE_SPACE=3",
        "VLLM_ENABLE_V1_MULTIPROCESSING=0",
        "VLLM_LOGGING_LEVEL=ERROR",
    }
