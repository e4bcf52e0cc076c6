from __future__ import annotations

import argparse
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate as stock_generate
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache

from mlx_port import chat, generate, options
from tests.mlx_port.test_stream import PROMPTS, make_pair
from tests.mlx_port.twins import EXAMPLE, save_random

ROOT = EXAMPLE.parents[1]
PAIR = ["--model", str(EXAMPLE / "target"), "--drafter", str(EXAMPLE / "drafter")]
# without a budget forwards are timed first
BUDGET = ("--tree-budget", "8")


def _generate(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    status = generate.main([*PAIR, *BUDGET, "--max-tokens", "12", "--ignore-chat-template", *arguments])
    assert status == 0
    return capsys.readouterr().out


def _answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert generate.main([*arguments]) == 0
    return capsys.readouterr().out


def _flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings}


def test_generate_takes_mlx_lms_flags_with_its_defaults() -> None:
    stock = _flags(importlib.import_module("mlx_lm.generate").setup_arg_parser())
    ours = _flags(generate._make_parser())

    assert stock.keys() <= ours.keys()
    # a drafter has a length of its own, and mlx-lm's versions do not agree about the last one
    for flag in stock.keys() & ours.keys() - {"--draft-model", "--num-draft-tokens", "--xtc-threshold"}:
        assert (flag, ours[flag].default, ours[flag].nargs) == (flag, stock[flag].default, stock[flag].nargs)
    assert {"--drafter", "--beam-width", "--draft-length", "--tree-budget", "--drafter-bits"} <= ours.keys()


def test_a_default_chat_template_is_taken_where_transformers_has_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*PAIR, *BUDGET, "--max-tokens", "4", "--prompt", "What is zip?", "--verbose", "F"]
    expected = _answer(capsys, *asked)
    load = options.load

    def load_without_template(*arguments: Any, **keywords: Any) -> Any:
        pair = load(*arguments, **keywords)
        template, pair.tokenizer.chat_template = pair.tokenizer.chat_template, None
        pair.tokenizer.has_chat_template = False
        pair.tokenizer._tokenizer.default_chat_template = template if has_default else None
        return pair

    monkeypatch.setattr(options, "load", load_without_template)
    has_default = False
    assert _answer(capsys, *asked) != expected
    assert generate.main([*asked, "--use-default-chat-template"]) == 1
    assert "neither this tokenizer nor transformers has a chat template for it" in capsys.readouterr().err
    has_default = True
    assert _answer(capsys, *asked, "--use-default-chat-template") == expected


def test_images_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([*PAIR, "--image", "cat.png"]) == 1
    assert "a drafter does not read images: ask mlx_lm alone" in capsys.readouterr().err


def test_quantised_activations_are_mlx_lms_to_load(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def load(*arguments: Any, model_config: dict[str, Any], **keywords: Any) -> Any:
        asked.append(model_config)
        raise ValueError("seen")

    monkeypatch.setattr(options, "load", load)
    monkeypatch.setattr(options.nn, "QQLinear", object(), raising=False)

    assert generate.main([*PAIR]) == generate.main([*PAIR, "-qa"]) == 1
    assert asked == [{}, {"quantize_activations": True}]
    monkeypatch.delattr(options.nn, "QQLinear")
    capsys.readouterr()
    assert generate.main([*PAIR, "--quantize-activations"]) == 1
    assert "cannot quantise activations: leave out --quantize-activations" in capsys.readouterr().err


def test_generate_prints_the_text_and_its_speed(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([*PAIR, "--max-tokens", "12", "--ignore-chat-template", "--prompt", PROMPTS[0]]) == 0
    lines = capsys.readouterr().out.split("=" * 10 + "\n")

    assert lines[0].strip()
    assert [line.partition(":")[0] for line in lines[1].splitlines()] == [
        "Prompt",
        "Generation",
        "Peak memory",
        "Drafting",
    ]


def test_generate_without_verbose_prints_what_mlx_lm_returns(capsys: pytest.CaptureFixture[str]) -> None:
    pair = make_pair()
    pair.target.model.set_dtype(mx.bfloat16)
    expected = stock_generate(pair.target.model, pair.tokenizer, PROMPTS[0], max_tokens=12)
    pair.target.model.set_dtype(mx.float32)

    assert _generate(capsys, "--prompt", PROMPTS[0], "--verbose", "F") == expected + "\n"


@pytest.mark.parametrize(
    "flags", [("--drafter-bits", "4"), ("--drafter-bits", "8"), ("--beam-width", "2", "--draft-length", "3")], ids=str
)
def test_how_drafts_are_made_leaves_a_greedy_text_alone(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = _generate(capsys, "--prompt", PROMPTS[0], "--verbose", "F")

    assert _generate(capsys, *flags, "--prompt", PROMPTS[0], "--verbose", "F") == plain


def test_a_text_ends_at_an_extra_end_token(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_pair().tokenizer
    plain = _generate(capsys, "--prompt", PROMPTS[0], "--verbose", "F")[:-1]
    token_ids = tokenizer.encode(plain, add_special_tokens=False)
    end = token_ids.index(token_ids[7])
    token = tokenizer.convert_ids_to_tokens(token_ids[end])

    ended = _generate(capsys, "--extra-eos-token", token, "--prompt", PROMPTS[0], "--verbose", "F")

    assert ended == tokenizer.decode(token_ids[:end]) + "\n"


def test_mlx_lms_names_for_drafting_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    plain = _generate(capsys, "--prompt", PROMPTS[0], "--verbose", "F")

    status = generate.main(
        [
            *("--model", str(EXAMPLE / "target"), "--draft-model", str(EXAMPLE / "drafter"), "--num-draft-tokens", "2"),
            *(*BUDGET, "-m", "12", "--ignore-chat-template", "-p", PROMPTS[0], "--verbose", "F"),
        ]
    )

    assert status == 0
    assert capsys.readouterr().out == plain


def test_the_prompt_may_come_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _generate(capsys, "--prompt", PROMPTS[0], "--verbose", "F")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPTS[0]))

    assert _generate(capsys, "--prompt", "-", "--verbose", "F") == plain


def test_a_seed_repeats_a_sampled_text(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--prompt", PROMPTS[0], "--temp", "1", "--top-p", "0.9", "--seed", "3", "--verbose", "F")

    assert _generate(capsys, *arguments) == _generate(capsys, *arguments)


def test_a_saved_prompt_cache_is_continued(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pair = make_pair()
    token_ids = pair.tokenizer.encode(PROMPTS[0])
    caches = make_prompt_cache(pair.target.model)
    pair.target.model.set_dtype(mx.bfloat16)
    pair.target.model(mx.array(token_ids[:5])[None], cache=caches)
    pair.target.model.set_dtype(mx.float32)
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, caches, {"model": str(EXAMPLE / "target"), "tokenizer_config": "{}"})
    whole = _generate(capsys, "--prompt", PROMPTS[0], "--verbose", "F")
    rest = pair.tokenizer.decode(token_ids[5:])

    assert _generate(capsys, "--prompt", rest, "--prompt-cache-file", file, "--verbose", "F") == whole
    other = generate.main(["--model", "other", "--drafter", "d", "--prompt-cache-file", file])
    assert other == 1
    assert "--model is 'other', but the prompt cache was made with" in capsys.readouterr().err


def test_what_the_user_got_wrong_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "damaged").write_text("no caches")
    cases = {
        "no target at '/nowhere'": ["--model", "/nowhere", *PAIR[2:]],
        "--temp is -1.0, but it must be 0 or more": [*PAIR, *BUDGET, "--temp", "-1"],
        "max_kv_size is 4, but mlx-lm always keeps 4 tokens": [*PAIR, *BUDGET, "--max-kv-size", "4"],
        "is no prompt cache": [*PAIR, "--prompt-cache-file", str(tmp_path / "damaged")],
        "the tree budget is 99, but it must lie between 1 and 63": [*PAIR, "--tree-budget", "99"],
        "does not fit this llama target": [*PAIR[:2], "--drafter", str(save_random(tmp_path / "other"))],
        "no config.json in": [*PAIR[:2], "--drafter", str(tmp_path)],
        "in groups of 7": [*PAIR, "--drafter-bits", "4", "--drafter-group-size", "7"],
        "no prompt cache at": [*PAIR, "--prompt-cache-file", str(tmp_path / "none")],
    }
    for message, arguments in cases.items():
        assert generate.main(arguments) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.startswith("error: ")
        assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(("text", "message"), [("{x", "is not JSON"), ("[1]", "must be a JSON object of")])
def test_template_arguments_must_be_a_json_object(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate.main([*PAIR, "--chat-template-config", text])
    assert message in capsys.readouterr().err


def test_an_interrupted_program_says_so_and_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    assert options.run(argparse.ArgumentParser(), interrupt, []) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_chat_remembers_the_conversation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for lines in (["What is a list?", "And a tuple?"], ["What is a list?", "r", "And a tuple?"]):
        inputs = iter([*lines, "h", "q"])
        monkeypatch.setattr("builtins.input", lambda prompt, inputs=inputs: next(inputs))
        assert chat.main([*PAIR, *BUDGET, "--max-tokens", "10"]) == 0, capsys.readouterr().err
        answers.append([part for part in capsys.readouterr().out.splitlines() if part])

    assert answers[0][0] == "q leaves, r starts afresh, h says this"
    assert answers[0][1] == answers[1][1]
    assert answers[0] != answers[1]


def test_chat_needs_a_template(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.options, "has_chat_template", lambda _: False)
    monkeypatch.setattr(chat.options, "load_pair", lambda *_: make_pair())

    assert chat.main(PAIR) == 1
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("mlx_lm", "mlx_port needs mlx and mlx-lm: pip install 'vllm-redrafter[mlx]'"),
        ("mlx.core", "mlx has no backend here (libmlx.so: cannot open shared object file): on Linux it comes with an"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(broken: str, message: str, tmp_path: Path) -> None:
    package = tmp_path / broken.partition(".")[0]
    package.mkdir()
    (package / "__init__.py").touch()
    if broken == "mlx.core":
        # what mlx does on Linux without an extra
        (package / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    script = "import importlib.util as u; find = u.find_spec\n"
    if broken == "mlx_lm":
        script += "u.find_spec = lambda name: None if name == 'mlx_lm' else find(name)\n"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path if broken == 'mlx.core' else ''}:{ROOT}"}

    result = subprocess.run(
        [sys.executable, "-c", script + "import mlx_port"], capture_output=True, text=True, env=environment
    )

    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"ImportError: {message}")


def test_the_port_imports_no_torch_and_nothing_of_vllm_redrafter() -> None:
    script = "import sys, mlx_port.chat, mlx_port.generate; print({'vllm', 'vllm_redrafter'} & set(sys.modules))"

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)

    assert result.stdout == "set()\n"
