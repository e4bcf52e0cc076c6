"""The automatic budget under model runner V2: when it can be had, and how vLLM is told."""

from __future__ import annotations

from typing import Any

from vllm_redrafter.adapter.v2.sizes import graph_sizes

SIZES_KEY = "num_speculative_tokens_per_batch_size"
"""vLLM's own key: trees of another size for batches of another size."""

SCHEDULER_PATH = "vllm_redrafter.adapter.v2.scheduler.make"

_FEWEST_USUAL_SEQS = 128
"""Requests of a batch where `max_num_seqs` is left to vLLM, at the least."""


def choose_budget(request: dict[str, Any], engine_args: Any, parallel: Any) -> Any:
    """Return what a request asks for, or what it gets where it says nothing: automatic wherever that can be had.

    Raises:
        ValueError: an automatic budget was asked for where it cannot.
    """
    obstacle = _obstacle(request, engine_args, parallel)
    if "budget" not in request:
        return "fixed" if obstacle else "auto"
    if request["budget"] == "auto" and obstacle:
        raise ValueError(f'budget is "auto", but {obstacle}: leave one of the two out')
    return request["budget"]


def _obstacle(request: dict[str, Any], engine_args: Any, parallel: Any) -> str | None:
    if request.get(SIZES_KEY) is not None:
        return f"{SIZES_KEY} says how large trees are"
    if engine_args.scheduler_cls not in (None, SCHEDULER_PATH):
        return f"the scheduler that chooses sizes is ours, and scheduler_cls is {engine_args.scheduler_cls!r}"
    if parallel.data_parallel_size > 1:
        return "with data parallelism (data_parallel_size) vLLM lets no rank choose for itself"
    return None


def arrange(budget: str, num_nodes: int, engine_args: Any) -> dict[str, Any]:
    """Have vLLM use our scheduler where the budget is automatic; return what the speculative config needs for it."""
    if budget == "auto":
        engine_args.scheduler_cls = SCHEDULER_PATH
        return {SIZES_KEY: graph_sizes(num_nodes, engine_args.max_num_seqs or _FEWEST_USUAL_SEQS)}
    if engine_args.scheduler_cls == SCHEDULER_PATH:
        # the same arguments have made another engine
        engine_args.scheduler_cls = None
    return {}
