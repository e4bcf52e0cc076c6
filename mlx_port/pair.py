"""A target and its drafter, loaded to work together."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx_lm
from huggingface_hub.errors import HFValidationError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_port import checkpoint
from mlx_port.drafter import ReDrafter
from mlx_port.target import Target


class Pair(NamedTuple):
    """What it takes to generate text."""

    target: Target
    tokenizer: TokenizerWrapper
    drafter: ReDrafter


def load(
    model: str,
    drafter: str,
    *,
    drafter_bits: int | None = None,
    drafter_group_size: int = 64,
    recurrent: bool = False,
    **mlx_lm_options: Any,
) -> Pair:
    """Return a target, its tokenizer and its drafter, each from a directory or a Hub id.

    Args:
        drafter_bits: 4 or 8 quantises the drafter; by default it has the target's floating-point type.
        recurrent: whether to take targets with recurrent layers, where drafting seldom pays.
        mlx_lm_options: `mlx_lm.load`'s own, `adapter_path` and `tokenizer_config` among them.

    Raises:
        ValueError: one of the two cannot be loaded, or the drafter was made for another target.
        NotImplementedError: the target cannot verify drafts.
    """
    # a mistake in what is small is said before what is large is read
    checkpoint.load_config(checkpoint.resolve(drafter))
    try:
        stock, tokenizer = mlx_lm.load(model, **mlx_lm_options)[:2]
    except (HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"no target at {model!r} ({reason}): pass a directory or a Hub id, and check the network and HF_HUB_OFFLINE"
        ) from None
    target = Target(stock, recurrent)
    loaded = checkpoint.load_drafter(drafter, dtype=target.dtype, bits=drafter_bits, group_size=drafter_group_size)
    target.lend(loaded)
    return Pair(target, tokenizer, loaded)
