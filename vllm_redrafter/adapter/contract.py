"""A promise of vLLM's that the adapter counts on; `adapter.patches` checks it."""

from __future__ import annotations

from typing import NamedTuple


class Contract(NamedTuple):
    """A function of vLLM with the parameters that we count on, `self` left out."""

    module: str
    qualified_name: str
    parameters: tuple[str, ...]
