"""The example pair that ships with the project, and the script that makes such pairs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vllm_redrafter.core.checkpoint import check_against_target, load_drafter
from vllm_redrafter.core.decoding import autoregressive, generate
from vllm_redrafter.core.drafter import ReDrafter

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = EXAMPLES / "models"
MAX_PAIR_BYTES = 9_000_000


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODELS / "target", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODELS / "target")


@pytest.fixture(scope="module")
def drafter() -> ReDrafter:
    return load_drafter(MODELS / "drafter")


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return (MODELS / "prompts.txt").read_text(encoding="utf-8").splitlines()


def test_the_pair_is_no_larger_than_nine_megabytes() -> None:
    sizes = {path: path.stat().st_size for path in MODELS.rglob("*") if path.is_file()}

    assert MODELS / "target" / "model.safetensors" in sizes
    assert MODELS / "drafter" / "model.safetensors" in sizes
    assert sum(sizes.values()) <= MAX_PAIR_BYTES


def test_the_drafter_is_made_for_the_target(target: PreTrainedModel, drafter: ReDrafter) -> None:
    config = target.config

    check_against_target(
        drafter.config,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        target=str(MODELS / "target"),
    )
    assert drafter.config.verifier == "examples/models/target"


def test_prompts_are_distinct_lines_of_text(prompts: list[str]) -> None:
    assert len(set(prompts)) == len(prompts) >= 20
    assert all(prompt.isascii() and prompt.strip() == prompt for prompt in prompts)


@pytest.mark.parametrize(
    "prompt", ["The with statement is used to", "A function definition is an executable statement."]
)
def test_greedy_text_is_made_of_words(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    generation = autoregressive(target, torch.tensor(tokenizer.encode(prompt)), 64)
    text = tokenizer.decode(generation.token_ids)

    words = re.findall(r"[A-Za-z]{2,}", text)
    assert text.isascii()
    assert sum(map(len, words)) > 0.5 * len(text)
    assert Counter(generation.token_ids).most_common(1)[0][1] < 20


def test_greedy_prose_seldom_repeats_itself(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> None:
    shares = []
    for prompt in prompts:
        if not prompt.startswith("def "):
            ids = autoregressive(target, torch.tensor(tokenizer.encode(prompt)), 48).token_ids
            runs = list(zip(*(ids[start:] for start in range(6)), strict=False))
            shares.append(len(set(runs)) / len(runs))

    # text that loops from its second sentence on has a share of 0.5
    assert sum(shares) / len(shares) > 0.85


def test_a_chat_is_laid_out_as_user_and_assistant(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "What does zip do?"}]

    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert text == "User: What does zip do?\nAssistant:"


def test_eight_nodes_yield_more_than_two_and_a_half_tokens_per_step(
    target: PreTrainedModel, drafter: ReDrafter, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> None:
    accepted: list[int] = []
    for prompt in prompts:
        ids = torch.tensor(tokenizer.encode(prompt))
        accepted += generate(target, drafter, ids, 48, num_nodes=8).num_accepted

    assert 1 + sum(accepted) / len(accepted) >= 2.5


def test_the_drafter_changes_nothing_in_greedy_text(
    target: PreTrainedModel, drafter: ReDrafter, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> None:
    for prompt in prompts[::6]:
        ids = torch.tensor(tokenizer.encode(prompt))

        drafted = generate(target, drafter, ids, 48, num_nodes=8)

        assert drafted.token_ids == autoregressive(target, ids, 48).token_ids
        assert sum(drafted.num_accepted) > 0


@pytest.mark.slow
def test_the_script_makes_a_pair_that_loads(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train_example_pair.py"), "--output", str(tmp_path), "--quick"]

    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr[-2000:]
    figures = json.loads(result.stdout.splitlines()[-1])
    assert set(figures["mean_acceptance_length"]) == {"greedy", "temperature 1"}
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    drafter = load_drafter(tmp_path / "drafter")
    ids = torch.tensor(tokenizer.encode("Return the"))
    assert generate(target, drafter, ids, 8).token_ids == autoregressive(target, ids, 8).token_ids
