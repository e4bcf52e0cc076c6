"""What the attention of a tree is held against: stock attention of a chain of as many rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_redrafter.bench import graph_time
from vllm_redrafter.bench.tree_batches import Batch

_FP8 = torch.float8_e4m3fn


def chain_attention(batch: Batch, kv_bytes: int) -> list[Callable[[], object]]:
    """Return calls that attend to the same context with the rows of a batch as chains, each with keys of its own.

    Args:
        batch: on a GPU, as many rows for every request.
        kv_bytes: of keys and values that one call reads, by which is decided how many calls defeat the cache.
    """
    attend = _flash_attention()
    if attend is None:
        return _torch_attention(batch, kv_bytes)
    query, trees = batch.query[: int(batch.trees.query_start_loc[-1])], batch.trees
    is_fp8 = batch.cache.dtype == _FP8
    num_requests, num_rows = len(trees.seq_lens), trees.ancestors.shape[1]
    scale = torch.ones(1, 1, device=query.device).expand(num_requests, batch.cache.shape[2]) if is_fp8 else None
    arguments: dict[str, Any] = {
        "q": query.to(_FP8) if is_fp8 else query,
        "out": torch.empty_like(query),
        "cu_seqlens_q": trees.query_start_loc,
        "max_seqlen_q": num_rows,
        "seqused_k": trees.seq_lens,
        "max_seqlen_k": trees.max_seq_len,
        "block_table": trees.block_table.clamp(min=0),
        "causal": True,
        "q_descale": scale,
        "k_descale": scale,
        "v_descale": scale,
        "fa_version": 3 if torch.cuda.get_device_capability()[0] == 9 else 2,
    }

    def call(cache: torch.Tensor) -> Callable[[], object]:
        _, keys, values, _ = batch._replace(cache=cache).inputs
        return lambda: attend(k=keys, v=values, **arguments)

    return [call(batch.cache.clone()) for _ in range(graph_time.num_copies(kv_bytes))]


def _flash_attention() -> Callable[..., object] | None:
    """Return FlashAttention as vLLM ships it, if it is here."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    attend: Callable[..., object] = flash_attn_varlen_func
    return attend


def _torch_attention(batch: Batch, kv_bytes: int) -> list[Callable[[], object]]:
    """Return calls of torch's attention, which knows neither pages nor fp8."""
    num_requests, num_rows = len(batch.trees.seq_lens), batch.trees.ancestors.shape[1]
    _, num_heads, head_size = batch.query.shape
    query = batch.query[: num_requests * num_rows].view(num_requests, num_rows, num_heads, head_size).transpose(1, 2)
    shape = (num_requests, batch.cache.shape[2], batch.trees.max_seq_len, head_size)

    def call() -> Callable[[], object]:
        keys, values = (torch.randn(shape, device=query.device, dtype=query.dtype) for _ in range(2))
        return lambda: torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    own_bytes = kv_bytes * query.element_size() // batch.cache.element_size()
    return [call() for _ in range(graph_time.num_copies(own_bytes))]
