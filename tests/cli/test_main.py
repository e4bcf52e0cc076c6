from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import FakePair
from vllm_redrafter import __version__
from vllm_redrafter.cli.main import main

ROOT = Path(__file__).parents[2]
COMMANDS = (
    *("demo", "verify", "doctor", "generate"),
    *("distill", "train", "evaluate", "convert", "push", "bench"),
)


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_takes_under_a_second_and_imports_the_standard_library_only(arguments: list[str]) -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from vllm_redrafter.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally:\n"
        "    tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "    print(sorted(tops - set(sys.stdlib_module_names) - {'vllm_redrafter'}), file=sys.stderr)\n"
    )
    usage = os.times()

    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)

    after = os.times()
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ")
    assert result.stderr.strip() == "[]"
    # processor time: the machine may be busy with something else
    assert after.children_user + after.children_system - usage.children_user - usage.children_system < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["serve"], "invalid choice: 'serve'"),
        (["generate", "--target", "t", "--baseline"], "one of the arguments --prompt --prompts --interactive"),
        (["generate", "--target", "t", "--baseline", "--prompt", "a", "--interactive"], "not allowed with"),
        (
            ["generate", "--target", "t", "--baseline", "--prompt", "a", "--max-tokens", "0"],
            "'0' is no integer of at least",
        ),
        (["generate", "--target", "t", "--baseline", "--prompt", "a", "--top-p", "0"], "'0' is no number above 0"),
        (["generate", "--target", "t", "--baseline", "--prompt", "a", "--temperature", "nan"], "'nan' is no number of"),
        (["generate", "--target", "t", "--baseline", "--prompt", "a", "--temperature", "x"], "'x' is no number"),
        (["verify", "--target", "t"], "the following arguments are required: --drafter"),
        (["verify", "--target", "t", "--drafter", "d", "--num-speculative-tokens", "64"], "from 1 to 63"),
        (["generate", "--target", "t", "--drafter", "d", "--prompt", "a", "--draft-length", "64"], "from 1 to 63"),
        (["evaluate", "--target", "t", "--drafter", "d", "--data", "f", "--beam-width", "64"], "from 1 to 63"),
        (["train", "--target", "t", "--data", "f", "--output", "d", "--num-offsets", "64"], "from 1 to 63"),
        (["demo", "--colour", "always"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_usage_is_said_and_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)

    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])

    assert capsys.readouterr().out.strip() == f"vllm-redrafter {__version__}"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("./nowhere", "--target: no directory './nowhere': pass a model's directory or a Hub id"),
        ("a/b/c", "--target: no directory 'a/b/c'"),
        ("not an id", "--target: no directory 'not an id'"),
        ("{file}", "is a file: pass the directory of a model"),
        ("{empty}", "--target: no config.json in"),
    ],
)
@pytest.mark.parametrize("command", [("verify",), ("generate", "--prompt", "a"), ("demo",)])
def test_a_target_that_is_none_is_refused_before_an_engine_starts(
    command: tuple[str, ...],
    target: str,
    message: str,
    fake_pair: FakePair,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, drafter = fake_pair(log="an engine was started")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    target = target.format(file=tmp_path / "file", empty=tmp_path / "empty")

    status = main([*command, "--target", target, "--drafter", drafter])

    captured = capsys.readouterr()
    assert status == 1
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_drafter_that_is_none_is_refused_before_an_engine_starts(
    fake_pair: FakePair, capsys: pytest.CaptureFixture[str]
) -> None:
    target, _ = fake_pair(log="an engine was started")

    assert main(["verify", "--target", target, "--drafter", "/nowhere/drafter"]) == 1
    assert capsys.readouterr().err == (
        "vllm-redrafter verify: --drafter: no directory '/nowhere/drafter': pass a model's directory or a Hub id\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_exits_with_130_and_takes_its_engine_along(
    number: signal.Signals, fake_pair: FakePair, tmp_path: Path
) -> None:
    target, _ = fake_pair(hangs=True, pid_file=str(tmp_path / "pid"))
    fake = Path(__file__).with_name("fake_engine_child.py")
    code = (
        "import sys; from vllm_redrafter.cli import engine, main\n"
        f"engine.CHILD_COMMAND = (sys.executable, {str(fake)!r})\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    arguments = ["generate", "--target", target, "--baseline", "--prompt", "a", "--prompt", "b"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path / "logs")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    # the first answer is printed when it is there, the second never comes
    assert process.stdout.readline() == "> a\n"
    engine_pid = int((tmp_path / "pid").read_text())

    # `timeout` sends its signal twice, and so do impatient users
    while process.poll() is None:
        process.send_signal(number)
        time.sleep(0.001)
    _, errors = process.communicate(timeout=20)

    assert process.returncode == 130
    assert errors.splitlines()[-1] == "vllm-redrafter generate: interrupted"
    assert list((tmp_path / "logs").iterdir()) == []
    assert not Path(f"/proc/{engine_pid}").exists() or wait_for_end(engine_pid)


def wait_for_end(pid: int) -> bool:
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False
