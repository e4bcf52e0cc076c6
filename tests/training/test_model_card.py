"""The card says what was recorded and measured, and calls the rest unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.training import model_card

PROVENANCE = {
    "command": "vllm-redrafter train --target org/target --data chats.jsonl --output drafter",
    "versions": {"vllm-redrafter": "0.1.0", "torch": "2.13.0", "vllm": None},
    "data": [{"name": "chats.jsonl", "sha256": "ab" * 32}, {"name": "written by the target", "sha256": None}],
    "target": "org/target",
    "target_revision": "c0ffee",
    "licence": "apache-2.0",
}
EVALUATION = {
    "offsets": [{"offset": 1, "top1": 0.7251, "topk": 0.91, "k": 5}, {"offset": 2, "top1": 0.5, "topk": 0.8, "k": 5}],
    "acceptance": [
        {"source": "all", "temperature": 0.0, "beam_width": 4, "num_nodes": 8, "mean_acceptance_length": 2.904},
        {"source": "code|chat", "temperature": 1.0, "beam_width": 1, "num_nodes": 16, "mean_acceptance_length": 1.9},
    ],
}


def render(
    directory: Path,
    provenance: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    **changes: Any,
) -> str:
    for name, content in (("provenance.json", provenance), ("evaluation.json", evaluation)):
        if content is not None:
            (directory / name).write_text(json.dumps(content))
    config = ReDrafterConfig(**({"hidden_size": 4, "vocab_size": 12, "verifier": "org/target"} | changes))
    return model_card.render(directory, "user/my-drafter", config, 720_000)


def metadata(card: str) -> dict[str, Any]:
    start, front_matter, _ = card.split("---\n", 2)
    assert start == ""
    parsed: dict[str, Any] = yaml.safe_load(front_matter)
    return parsed


def test_the_hub_finds_base_model_licence_and_library_in_the_front_matter(tmp_path: Path) -> None:
    found = metadata(render(tmp_path, PROVENANCE, EVALUATION))

    assert found == {
        "base_model": "org/target",
        "license": "apache-2.0",
        "library_name": "vllm-redrafter",
        "pipeline_tag": "text-generation",
        "tags": ["redrafter", "speculative-decoding", "speculators", "vllm"],
    }


def test_everything_that_was_recorded_and_measured_is_on_the_card(tmp_path: Path) -> None:
    lines = render(tmp_path, PROVENANCE, EVALUATION, draft_vocab_size=7).splitlines()

    assert lines[lines.index("## Serve") - 4] == "# my-drafter"
    text = "\n".join(lines)
    assert "[org/target](https://huggingface.co/org/target), revision `c0ffee`" in text
    assert "0.72M parameters: an RNN, 2 residual blocks of 8, its own head over 7 of 12 tokens." in text
    assert "| 1 | 0.725 | 0.910 (k = 5) |" in lines
    assert "| 2 | 0.500 | 0.800 (k = 5) |" in lines
    assert "| all | 0 | tree of 8 | 2.90 |" in lines
    assert r"| code\|chat | 1 | chain of 16 | 1.90 |" in lines
    assert f"| `chats.jsonl` | `{'ab' * 32}` |" in lines
    assert "| `written by the target` | – |" in lines
    assert PROVENANCE["command"] in lines
    assert "vllm-redrafter 0.1.0, torch 2.13.0." in lines
    assert lines[lines.index("## Licence") + 2] == "apache-2.0"


def test_the_card_names_fused_layers(tmp_path: Path) -> None:
    card = render(tmp_path, fused_layers=[0, 5])

    assert "its own head, fed by the target's layers 0, 5 besides its last state.\n" in card


def test_a_target_on_the_hub_is_served_by_the_drafter_alone_or_by_both_names(tmp_path: Path) -> None:
    card = render(tmp_path, num_speculative_tokens=6)

    assert "\nvllm serve user/my-drafter\n" in card
    request = card.split("vllm serve org/target \\\n  --speculative-config '")[1].split("'")[0]
    assert json.loads(request) == {"method": "redrafter", "model": "user/my-drafter", "num_speculative_tokens": 6}


@pytest.mark.parametrize("verifier", ["/models/target", "examples/models/target", None])
def test_a_target_that_no_repository_can_be_is_not_called_a_base_model(tmp_path: Path, verifier: str | None) -> None:
    card = render(tmp_path, verifier=verifier)

    assert "base_model" not in metadata(card)
    assert "vllm serve user/my-drafter" not in card
    assert f"vllm serve {verifier or 'TARGET'} \\" in card


def test_the_target_that_the_config_leaves_out_is_taken_from_the_record_of_the_training(tmp_path: Path) -> None:
    assert metadata(render(tmp_path, PROVENANCE, verifier=None))["base_model"] == "org/target"


def test_what_is_not_known_is_called_unknown(tmp_path: Path) -> None:
    card = render(tmp_path, verifier=None)

    assert "license" not in metadata(card)
    for section, words in (
        ("Accuracy by offset", "Not measured."),
        ("Acceptance by task", "Not measured."),
        ("Data", "Not recorded."),
        ("Made with", "Not recorded."),
        ("Licence", "Not recorded."),
    ):
        assert f"## {section}\n\n{words}\n" in card


@pytest.mark.parametrize(
    ("provenance", "evaluation", "message"),
    [
        (
            {"data": "chats.jsonl"},
            None,
            r"data in '.*provenance.json' is 'chats.jsonl', but it must be a list of objects",
        ),
        ({"data": [{"name": "a"}]}, None, r"data\[0\] in '.*provenance.json' lacks sha256: correct the file or remove"),
        (None, {"offsets": [{"offset": 1}]}, r"offsets\[0\] in '.*evaluation.json' lacks top1, topk, k: correct"),
        (
            None,
            {
                "acceptance": [
                    {
                        "source": "all",
                        "temperature": 0,
                        "beam_width": 4,
                        "num_nodes": 8,
                        "mean_acceptance_length": "high",
                    }
                ]
            },
            r"acceptance\[0\].mean_acceptance_length in '.*evaluation.json' is 'high', but it must be a number",
        ),
    ],
)
def test_a_record_that_is_not_one_is_refused(
    tmp_path: Path, provenance: dict[str, Any] | None, evaluation: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        render(tmp_path, provenance, evaluation)
