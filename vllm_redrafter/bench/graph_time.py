"""How long kernels take on a GPU, without what launching them costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

_NUM_REPLAYS = 20
_MIN_CALLS = 20
_COPIED_BYTES = 1 << 30


def time_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Return what one of the calls takes, as the median over replays of a CUDA graph that holds them all.

    The graph holds so many that its own launch, which takes longer than a small kernel, does not count. Where every
    call has data of its own, of some times the cache's size together, each finds it in memory, as a model's layers do.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    calls = list(calls) * -(-_MIN_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times = []
    for _ in range(_NUM_REPLAYS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    return median(times)


def copy_bytes_per_ms() -> float:
    """Return the bytes that a large copy reads and writes in a millisecond: what memory gives at best."""
    source = torch.zeros(_COPIED_BYTES // 8, dtype=torch.int64, device="cuda")
    target = torch.empty_like(source)
    # the driver's own copy may be slower than a kernel's
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    return 2 * _COPIED_BYTES / min(time_ms([way]) for way in ways)


def num_copies(num_bytes: int) -> int:
    """Return of how many copies of some data none is left in the cache when its turn comes again."""
    cache_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
    return max(2, min(64, -(-4 * cache_bytes // num_bytes)))
