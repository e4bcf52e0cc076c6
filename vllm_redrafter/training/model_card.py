"""The model card of a drafter: what it is for, what it was made from, how good it is, how it is served.

What it says stands in the drafter's config and in two files beside the checkpoint, written by training and evaluation.
Both are optional: what was not recorded or not measured is called that.

- `provenance.json`: `command`, `versions`, `data` (a list of `name`, `sha256`), `target`, `target_revision`, `licence`.
- `evaluation.json`: `offsets` (a list of `offset`, `top1`, `topk`, `k`) and `acceptance` (a list of `source`,
  `temperature`, `beam_width`, `num_nodes`, `mean_acceptance_length`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from vllm_redrafter.core import hub
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.weights import read_json

PROVENANCE_FILE = "provenance.json"
EVALUATION_FILE = "evaluation.json"
_OFFSET_KEYS = ("offset", "top1", "topk", "k")
_ACCEPTANCE_KEYS = ("source", "temperature", "beam_width", "num_nodes", "mean_acceptance_length")


def render(directory: Path, repository: str, config: ReDrafterConfig, num_parameters: int) -> str:
    """Return the README.md with which the drafter in `directory` stands in `repository` on the Hub.

    Raises:
        ValueError: `provenance.json` or `evaluation.json` is there and not what it should be.
    """
    provenance = _read(directory / PROVENANCE_FILE)
    evaluation = _read(directory / EVALUATION_FILE)
    target = config.verifier or provenance.get("target")
    sections = (
        _front_matter(provenance, target),
        f"# {repository.rpartition('/')[2]}",
        _what_it_is(config, num_parameters, target, provenance),
        "## Serve",
        _serving(repository, config, target),
        "## Accuracy by offset",
        _accuracy(_rows(evaluation, "offsets", _OFFSET_KEYS, directory / EVALUATION_FILE)),
        "## Acceptance by task",
        _acceptance(_rows(evaluation, "acceptance", _ACCEPTANCE_KEYS, directory / EVALUATION_FILE)),
        "## Data",
        _data(_rows(provenance, "data", ("name", "sha256"), directory / PROVENANCE_FILE)),
        "## Made with",
        _made_with(provenance),
        "## Licence",
        str(provenance.get("licence") or "Not recorded."),
    )
    return "\n\n".join(sections) + "\n"


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _front_matter(provenance: Mapping[str, Any], target: str | None) -> str:
    metadata = ModelCardData(
        license=provenance.get("licence"),
        # the Hub refuses a card whose base model could not be one of its repositories
        base_model=target if target is not None and hub.is_hub_id(target) else None,
        library_name="vllm-redrafter",
        pipeline_tag="text-generation",
        tags=["redrafter", "speculative-decoding", "speculators", "vllm"],
    )
    return f"---\n{metadata.to_yaml().strip()}\n---"


def _what_it_is(config: ReDrafterConfig, num_parameters: int, target: str | None, provenance: Mapping[str, Any]) -> str:
    revision = provenance.get("target_revision")
    head = "the target's own head" if config.tie_lm_head else "its own head"
    if config.draft_vocab_size is not None:
        head += f" over {config.draft_vocab_size} of {config.vocab_size} tokens"
    parts = [
        "an RNN" if config.rnn else "a sum of embeddings",
        f"{config.num_draft_layers} residual block{'s' * (config.num_draft_layers != 1)} of {config.exit_dim}",
        head,
    ]
    if config.fused_layers:
        parts.append(f"fed by the target's layers {', '.join(map(str, config.fused_layers))} besides its last state")
    return (
        f"A recurrent drafter ([arXiv 2403.09919](https://arxiv.org/abs/2403.09919)) for {_target(target)}"
        f"{f', revision `{revision}`' if revision else ''}: with it "
        "[vLLM](https://github.com/vllm-project/vllm) writes the same text in fewer steps. "
        f"{_millions(num_parameters)} parameters: {', '.join(parts)}."
    )


def _target(target: str | None) -> str:
    if target is None:
        return "a target that was not recorded"
    return f"[{target}](https://huggingface.co/{target})" if hub.is_hub_id(target) else f"`{target}`"


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f}M" if number < 1e8 else f"{number / 1e6:.0f}M"


def _serving(repository: str, config: ReDrafterConfig, target: str | None) -> str:
    request = {"method": "redrafter", "model": repository, "num_speculative_tokens": config.num_speculative_tokens}
    named = target or "TARGET"
    command = f"vllm serve {named} \\\n  --speculative-config '{json.dumps(request)}'"
    if target is not None and hub.is_hub_id(target):
        command = f"vllm serve {repository}\n\n# the same, with the target named\n{command}"
    shape = f"a beam of width {config.beam_width}, {config.draft_length} tokens deep"
    return (
        f"```sh\npip install 'vllm-redrafter[cpu]'\n{command}\n```\n\n"
        f"By default {shape}, of which the best {config.num_speculative_tokens} nodes are verified in a step."
    )


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Not measured."
    cells = [(row["offset"], f"{row['top1']:.3f}", f"{row['topk']:.3f} (k = {row['k']})") for row in rows]
    return (
        "How often the target's token at this distance is the drafter's first choice, and among its first k.\n\n"
        + _table(("offset", "top-1", "top-k"), cells)
    )


def _acceptance(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Not measured."
    cells = [
        (
            row["source"],
            f"{row['temperature']:g}",
            f"{'chain' if row['beam_width'] == 1 else 'tree'} of {row['num_nodes']}",
            f"{row['mean_acceptance_length']:.2f}",
        )
        for row in rows
    ]
    return "Mean acceptance length: tokens per step of the target, 1 without a drafter.\n\n" + _table(
        ("source", "temperature", "drafts", "tokens per step"), cells
    )


def _data(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Not recorded."
    # what was written in the course of the training has no file, and so no digest
    digests = [f"`{row['sha256']}`" if row["sha256"] else "–" for row in rows]
    return _table(
        ("name", "SHA-256"), [(f"`{row['name']}`", digest) for row, digest in zip(rows, digests, strict=True)]
    )


def _made_with(provenance: Mapping[str, Any]) -> str:
    if "command" not in provenance:
        return "Not recorded."
    versions = provenance.get("versions") or {}
    named = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    return f"```sh\n{provenance['command']}\n```" + (f"\n\n{named}." if named else "")


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _rows(content: Mapping[str, Any], name: str, keys: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """Return the list of objects under `name`, or nothing where it is absent.

    Raises:
        ValueError: it is something else, or an object lacks one of `keys`.
    """
    rows = content.get(name) or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{name} in {str(path)!r} is {rows!r}, but it must be a list of objects: correct or remove it")
    for index, row in enumerate(rows):
        missing = [key for key in keys if key not in row]
        if missing:
            raise ValueError(
                f"{name}[{index}] in {str(path)!r} lacks {', '.join(missing)}: correct the file or remove it"
            )
        figures = [key for key in keys if key not in ("source", "name", "sha256")]
        for key in figures:
            if not isinstance(row[key], int | float):
                raise ValueError(f"{name}[{index}].{key} in {str(path)!r} is {row[key]!r}, but it must be a number")
    return rows
