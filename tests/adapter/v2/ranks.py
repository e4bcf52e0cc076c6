"""Threads in the place of the ranks of tensor parallelism, with an all-gather among them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Found = TypeVar("Found")


class Ranks:
    def __init__(self, size: int) -> None:
        self.size = size
        self.num_gathers = 0
        self._barrier = threading.Barrier(size)
        self._sent: list[torch.Tensor] = [torch.empty(0)] * size
        self._thread = threading.local()

    def rank(self) -> int:
        """Return the rank that the calling thread is."""
        rank: int = self._thread.rank
        return rank

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return what the ranks send, one after the other."""
        self._sent[self.rank()] = tensor
        self._barrier.wait()
        received = torch.cat(self._sent, dim=dim)
        # nobody sends again before everybody has read
        if self._barrier.wait() == 0:
            self.num_gathers += 1
        return received

    def run(self, work: Callable[[int], Found]) -> list[Found]:
        """Return what every rank makes of the same work."""

        def run_as(rank: int) -> Found:
            self._thread.rank = rank
            try:
                return work(rank)
            except BaseException:
                # or the others would wait forever
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(run_as, range(self.size)))
