from __future__ import annotations

from pathlib import Path

import pytest

from vllm_redrafter.cli.engine_log import read_reason

LOGS = [
    (
        "Traceback (most recent call last):\n"
        '  File "x.py", line 1, in <module>\n'
        "ValueError: num_speculative_tokens is 99, but it must lie between 1 and 63\n",
        "num_speculative_tokens is 99, but it must lie between 1 and 63",
    ),
    (
        "(EngineCore pid=7) ERROR 11-21 08:10:58 [core.py:101] ValueError: the real reason\n"
        "(EngineCore pid=7) ERROR 11-21 08:10:58 [core.py:102] \n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n",
        "the real reason",
    ),
    (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, no such architecture [type=value_error, input_value=ArgsKwargs(()), input_type=Args]\n"
        "    For further information visit https://errors.pydantic.dev/2.12/v/value_error\n",
        "no such architecture",
    ),
    ("[W1121 utils.cpp:68] Warning: NUMA binding\nSome error: of no known kind\nKilled\n", None),
    ("", None),
]


@pytest.mark.parametrize(("log", "reason"), LOGS)
def test_the_reason_is_the_last_exception_that_is_no_wrapper(tmp_path: Path, log: str, reason: str | None) -> None:
    path = tmp_path / "engine.log"
    path.write_text(log)

    assert read_reason(path) == reason


def test_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.write_text("ValueError: old\n" + "x" * 300_000 + "\nKilled\n")

    assert read_reason(path) is None
