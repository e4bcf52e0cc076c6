"""`bench`: speed side by side with plain vLLM, and models to measure it on."""

from __future__ import annotations

from typing import Any

from vllm_redrafter.cli import bench_grow, bench_kernels, bench_speed, bench_steps, bench_training


def add_parser(commands: Any) -> None:
    """Add the sub-command, which has sub-commands of its own."""
    parser = commands.add_parser(
        "bench",
        help="measure the speed with and without the drafter",
        description="Measures speed, and makes models to measure it on.",
        allow_abbrev=False,
    )
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    for bench in (bench_speed, bench_steps, bench_kernels, bench_training, bench_grow):
        bench.add_parser(benches)
