"""`bench kernels`: the Triton kernels against their twins in torch, against the clock, and as compiled for GPUs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vllm_redrafter.cli import options, table
from vllm_redrafter.cli.errors import FAILED, CommandError

if TYPE_CHECKING:
    from vllm_redrafter.bench.kernel_binaries import Compiled
    from vllm_redrafter.bench.measurement import Measurement


_GPUS = (80, 86, 89, 90, 100, 103, 120)
"""Compute capabilities that the kernels are compiled for: A100, consumer Ampere, Ada, Hopper, three Blackwells."""


def add_parser(benches: Any) -> None:
    """Add the sub-command."""
    parser = benches.add_parser(
        "kernels",
        help="the GPU kernels: are they right, how far from the floor, what do they compile to",
        description="Compares the Triton kernels with their twins in torch; on a GPU also with the time that moving "
        "their bytes takes, and with what stock code takes. Without a GPU they are interpreted.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--compile-only",
        metavar="SM,...",
        nargs="?",
        type=options.list_of(_gpu),
        const=(80, 90, 100),
        help="only compile them, which needs no GPU: registers, shared memory, spills, loads (default: 80,90,100)",
    )
    for name, default, what in (
        ("batch-sizes", (1, 8, 32, 64), "requests"),
        ("contexts", (512, 2048, 8192, 32768), "tokens before the tree"),
    ):
        parser.add_argument(
            f"--{name}",
            metavar="N,...",
            type=options.list_of(options.positive_int),
            default=default,
            help=f"{what}, on a GPU (default: {','.join(map(str, default))})",
        )
    parser.add_argument(
        "--num-nodes", metavar="N", type=options.node_budget, default=16, help="of a tree, on a GPU (default: 16)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if find_spec("triton") is None:
        raise CommandError("the kernels need Triton, which is not installed: pip install triton")
    return _compile(arguments.compile_only) if arguments.compile_only else _measure(arguments)


def _measure(arguments: argparse.Namespace) -> int:
    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        print("there is no GPU here: the kernels are interpreted in small cases, and nothing is timed", file=sys.stderr)
        # before Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    from vllm_redrafter import provenance
    from vllm_redrafter.bench import kernels

    plan = kernels.Plan(arguments.batch_sizes, arguments.contexts, arguments.num_nodes)
    measurements = list(kernels.check("cuda" if has_gpu else "cpu"))
    print(render(measurements), flush=True)
    if has_gpu:
        timed = []
        for measurement in kernels.measure(plan):
            print(f"{measurement.kernel} {measurement.case}: {measurement.ms:.4f} ms", file=sys.stderr)
            timed.append(measurement)
        print("\n" + render_times(timed), flush=True)
        measurements += timed
    agree = all(measurement.agrees for measurement in measurements)
    gpu = torch.cuda.get_device_name() if has_gpu else None
    found = {"agree": agree, "gpu": gpu, "results": [measurement._asdict() for measurement in measurements]}
    print(json.dumps(provenance.describe() | found))
    return 0 if agree else FAILED


def _compile(capabilities: Sequence[int]) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CommandError("TRITON_INTERPRET=1 keeps Triton from compiling: unset it")
    from vllm_redrafter import provenance
    from vllm_redrafter.bench import kernel_binaries
    from vllm_redrafter.kernels.gpu import Gpu

    compiled: list[Compiled] = []
    for capability in capabilities:
        print(f"compiling for sm_{capability}", file=sys.stderr, flush=True)
        compiled += kernel_binaries.compile_all(capability)
    print(render_binaries(compiled), flush=True)
    spills = any(one.binary.spilled_bytes for one in compiled)
    fits = all(one.binary.shared_bytes <= Gpu(one.capability).shared_bytes for one in compiled)
    results = [{**one._asdict(), "binary": one.binary._asdict()} for one in compiled]
    print(json.dumps(provenance.describe() | {"spills": spills, "fits": fits, "results": results}))
    return 0 if fits and not spills else FAILED


def render(measurements: Sequence[Measurement]) -> str:
    """Return how far every kernel is from its twin, as a table."""
    return table.render(
        ("kernel", "case", "error", "at most", ""),
        [
            (one.kernel, one.case, f"{one.error:.1e}", f"{one.tolerance:.0e}", "ok" if one.agrees else "WRONG")
            for one in measurements
        ],
        left=2,
    )


def render_times(measurements: Sequence[Measurement]) -> str:
    """Return what every kernel takes beside its floor and beside stock code, as a table."""
    return table.render(
        ("kernel", "case", "error", "ms", "floor ms", "of floor", "stock ms", "x stock"),
        [
            (
                one.kernel,
                one.case,
                f"{one.error:.1e}" if one.agrees else "WRONG",
                table.number(one.ms, 4),
                table.number(one.floor_ms, 4),
                table.number(_ratio(one.floor_ms, one.ms, 100), 0, "%"),
                table.number(one.stock_ms, 4),
                table.number(_ratio(one.ms, one.stock_ms), 2, "x"),
            )
            for one in measurements
        ],
        left=2,
    )


def render_binaries(compiled: Sequence[Compiled]) -> str:
    """Return what every kernel needs of every kind of GPU, as a table."""
    return table.render(
        ("kernel", "case", "gpu", "registers", "shared bytes", "spilled bytes", "loads ahead"),
        [
            (one.kernel, one.case, f"sm_{one.capability}", *(table.number(count, 0) for count in one.binary))
            for one in compiled
        ],
        left=3,
    )


def _gpu(text: str) -> int:
    """Parse a compute capability."""
    if text not in map(str, _GPUS):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(str, _GPUS))}, the GPUs to compile for")
    return int(text)


def _ratio(above: float | None, below: float | None, times: float = 1.0) -> float | None:
    return None if above is None or not below else times * above / below
