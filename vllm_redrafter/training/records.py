"""Where training data lies: JSON, JSONL and text files, and `datasets`, read into plain records.

A record is a dictionary as the file has it; a text file's documents become `{"text": ...}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"
_SUFFIXES = (".json", ".jsonl", ".txt")
_SAVED = ("dataset_info.json", "dataset_dict.json")


def read_records(source: str | Path, text_separator: str | None = None) -> Iterator[Any]:
    """Yield what a file or a data set holds, in its order.

    Args:
        source: a `.json` list, a `.jsonl` file of an object per line, a `.txt` file, or what `datasets` loads: a name
            on the Hub or a directory, with `:split` behind it where that is not `train`.
        text_separator: what stands between the documents of a text file. By default `<|endoftext|>`; a file without
            it is one document.

    Raises:
        ValueError: the source is missing, empty, malformed or of another kind; the line is named.
    """
    path = Path(source)
    if path.is_file():
        return _read_file(path, text_separator)
    if path.suffix.lower() in _SUFFIXES:
        raise ValueError(f"no file {str(source)!r}: pass a data file, or the name of a data set")
    return _read_dataset(str(source))


def source_name(source: str | Path) -> str:
    """Return what the documents of a source are grouped under where they do not say it themselves."""
    path = Path(source)
    return path.stem if path.is_file() else path.name.partition(":")[0]


def _read_file(path: Path, text_separator: str | None) -> Iterator[Any]:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"{path} is neither .json, .jsonl nor .txt: convert or unpack it first")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}): convert or unpack it first") from None
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r} ({error.strerror}): see to its permissions") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: put at least one document into it")
    if suffix == ".txt":
        separator = END_OF_TEXT if text_separator is None else text_separator
        return ({"text": part.strip("\r\n")} for part in text.split(separator) if part.strip())
    if suffix == ".jsonl":
        # not splitlines: a JSON string may hold a line separator of Unicode's
        lines = enumerate(text.split("\n"), 1)
        return (_parse(line, path, number) for number, line in lines if line.strip())
    entries = _parse(text, path, 1)
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds no list: name it .jsonl if it has one object per line")
    return iter(entries)


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}, line {line}: no JSON ({error.msg}, column {error.colno}): mend it") from None


def _read_dataset(source: str) -> Iterator[Any]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(
            f"no file {source!r}, and without `datasets` it can be no data set: pip install 'vllm-redrafter[train]'"
        ) from None
    name, split = source, "train"
    if not Path(source).is_dir() and ":" in source:
        name, _, split = source.rpartition(":")
    try:
        if any((Path(name) / saved).is_file() for saved in _SAVED):
            loaded = datasets.load_from_disk(name)
            return iter(loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded)
        return iter(datasets.load_dataset(name, split=split))
    except (OSError, ValueError, KeyError) as error:
        # its messages run over many lines
        reason = " ".join(str(error).split())
        raise ValueError(
            f"no file and no data set {name!r} with a split {split!r} ({reason}): check the name"
        ) from None
