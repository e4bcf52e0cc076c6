"""mlx-lm's OpenAI-compatible server with a drafter: `python -m mlx_port.server --model M --drafter D`.

All flags and requests are those of `mlx_lm.server`, which runs unchanged but for the two functions that it loads models
and makes text with: a draft model that is a ReDrafter drafter is loaded by us, and its texts are ours. Like mlx-lm with
any draft model, it answers one request at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_lm import server

from mlx_port import checkpoint
from mlx_port.drafter import ReDrafter
from mlx_port.stream import stream_generate
from mlx_port.target import Target

_stock_load = server.load
_stock_stream_generate = server.stream_generate


class ServedDrafter:
    """What the server holds as its draft model: the drafter, and the target that it was lent to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.layers: list[Any] = []
        self._pair: tuple[Target, ReDrafter] | None = None

    def make_cache(self) -> list[Any]:
        """Return the caches that it needs beside the target's: none."""
        return []

    def beside(self, model: Any) -> tuple[Target, ReDrafter]:
        """Return target and drafter for a model; they are made once.

        Raises:
            ValueError: the drafter was made for another target.
            NotImplementedError: the target cannot verify drafts.
        """
        if self._pair is None or self._pair[0].model is not model:
            target = Target(model)
            drafter = checkpoint.load_drafter(self.directory, dtype=target.dtype)
            target.lend(drafter)
            self._pair = target, drafter
        return self._pair


def load(path: str, *args: Any, **options: Any) -> Any:
    """Return what `mlx_lm.load` does, or a drafter where `path` holds one."""
    directory = Path(path).expanduser()
    if not (directory / "config.json").is_file() or not checkpoint.is_drafter(directory):
        return _stock_load(path, *args, **options)
    config = checkpoint.load_config(directory)
    # in the place of a tokenizer, of which the server asks the size only
    return ServedDrafter(directory), SimpleNamespace(vocab_size=config.vocab_size)


def stream(model: Any, tokenizer: Any, prompt: Any, draft_model: Any = None, **options: Any) -> Iterator[Any]:
    """Yield what mlx-lm's `stream_generate` does; with a drafter of ours, the same in fewer steps."""
    if not isinstance(draft_model, ServedDrafter):
        return _stock_stream_generate(
            model=model, tokenizer=tokenizer, prompt=prompt, draft_model=draft_model, **options
        )
    if options.pop("input_embeddings", None) is not None:
        raise ValueError("a drafter does not read images: ask for a text, or serve without --drafter")
    # the drafter's own depth, as the server's flag has a default of its own
    for name in ("stream", "num_draft_tokens"):
        options.pop(name, None)
    target, drafter = draft_model.beside(model)
    return stream_generate(target, tokenizer, prompt, drafter, **options)


def main() -> None:
    """Run mlx-lm's server, with `--drafter` as another name of its `--draft-model`."""
    sys.argv = [argument.replace("--drafter", "--draft-model", 1) for argument in sys.argv]
    server.load, server.stream_generate = load, stream
    server.main()


if __name__ == "__main__":
    main()
