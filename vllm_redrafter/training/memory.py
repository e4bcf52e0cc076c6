"""The target's hidden states of text that was read before: a second pass over the data need not run the target.

They are kept in the computer's own memory, also where the target is on a GPU, in the precision that products are
computed in: where that is a lower one than the target's, all passes read them rounded, the first one too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from vllm_redrafter.training.batch import Batch


class HiddenMemory:
    """Hidden states by the number of the packed sequence that they belong to.

    Numbers mean something within one `pack` alone, so every training has a memory of its own.

    Args:
        most_bytes: what is read when that much is kept is computed anew every time.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._hidden: dict[int, torch.Tensor] = {}

    def read(self, batch: Batch, compute: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
        """Return what `compute` returns, [sequences, length, input_size], for sequences it has not returned before.

        Of the others it is what it was then, but for padding.
        """
        numbers = batch.numbers.tolist()
        missing = [row for row, number in enumerate(numbers) if number not in self._hidden]
        fresh: dict[int, torch.Tensor] = {}
        if missing:
            fresh = dict(zip(missing, _rounded(compute(Batch(*(field[missing] for field in batch)))), strict=True))
        length, device = batch.token_ids.shape[1], batch.token_ids.device
        rows = []
        for row, number in enumerate(numbers):
            if row in fresh:
                self._keep(number, fresh[row])
                rows.append(fresh[row])
            else:
                kept = self._hidden[number].to(device)
                # padding is all that may be cut off
                rows.append(functional.pad(kept, (0, 0, 0, length - len(kept))))
        return torch.stack(rows)

    def _keep(self, number: int, hidden: torch.Tensor) -> None:
        num_bytes = hidden.numel() * hidden.element_size()
        if self._num_bytes + num_bytes <= self._most_bytes:
            self._num_bytes += num_bytes
            # a copy: the row is a view of the whole batch
            self._hidden[number] = hidden.to("cpu", copy=True)


def _rounded(hidden: torch.Tensor) -> torch.Tensor:
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden
