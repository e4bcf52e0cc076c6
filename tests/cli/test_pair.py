from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.cli.conftest import SIZES, FakePair
from tests.loopback_hub import MAIN, running_hub, talk_to
from vllm_redrafter.cli.errors import CommandError
from vllm_redrafter.cli.main import main
from vllm_redrafter.cli.pair import check_pair
from vllm_redrafter.core.checkpoint import save_drafter
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter


def save_other(directory: Path, **sizes: int) -> str:
    save_drafter(ReDrafter(ReDrafterConfig(**SIZES | sizes, exit_dim=16)), directory)
    return str(directory)


@pytest.mark.parametrize("command", [["verify"], ["bench", "speed"], ["bench", "steps"], ["demo"]], ids=" ".join)
def test_a_drafter_of_another_target_is_refused_before_an_engine_starts(
    command: list[str], fake_pair: FakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pid_file = tmp_path / "pid"
    target, _ = fake_pair(pid_file=str(pid_file))
    other = save_other(tmp_path / "other", hidden_size=12, vocab_size=20)

    status = main([*command, "--target", target, "--drafter", other])

    assert status == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"vllm-redrafter {command[0]}: --drafter: the drafter does not fit the target {target!r}: it has hidden_size "
        "12 where the target has 8 and vocab_size 20 where the target has 16; pass a drafter that was trained for "
        "this target"
    )
    assert not pid_file.exists()


def test_what_is_no_drafter_is_refused(fake_pair: FakePair, tmp_path: Path) -> None:
    target, drafter = fake_pair()

    with pytest.raises(CommandError, match=r"--drafter: .*llama"):
        check_pair(target, target)
    (Path(drafter) / "model.safetensors").unlink()
    with pytest.raises(CommandError, match=r"--drafter: .*safetensors"):
        check_pair(target, drafter)
    with pytest.raises(CommandError, match=r"--target: no directory '\./nowhere'"):
        check_pair("./nowhere", drafter)


def test_a_drafter_with_another_tokenizer_is_refused(fake_pair: FakePair) -> None:
    target, drafter = fake_pair()
    for directory, vocabulary in ((target, {"one": 0, "two": 1}), (drafter, {"one": 1, "two": 0})):
        Tokenizer(WordLevel(vocabulary, unk_token="one")).save(f"{directory}/tokenizer.json")

    with pytest.raises(CommandError, match="the drafter's tokenizer is not the target's: 2 tokens"):
        check_pair(target, drafter)


def test_the_tokenizer_of_a_target_on_the_hub_is_compared_too(
    fake_pair: FakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, drafter = fake_pair()
    Tokenizer(WordLevel({"one": 1, "two": 0}, unk_token="one")).save(f"{drafter}/tokenizer.json")
    with running_hub() as (endpoint, state):
        talk_to(endpoint, tmp_path, monkeypatch)
        state.commits[MAIN] = {"tokenizer.json": b'{"model": {"vocab": {"one": 0, "two": 1}}}'}

        with pytest.raises(CommandError, match="the drafter's tokenizer is not the target's: 2 tokens"):
            check_pair("org/target", drafter)


def test_a_target_that_transformers_does_not_take_is_left_to_the_engine(fake_pair: FakePair) -> None:
    target, drafter = fake_pair()
    for config in ('{"model_type": "of_tomorrow"}', '{"model_type": "llama", "hidden_size": 7}'):
        (Path(target) / "config.json").write_text(config)
        check_pair(target, drafter)
