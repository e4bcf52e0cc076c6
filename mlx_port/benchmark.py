"""Apple's benchmarks of 2024 in one command: `python -m mlx_port.benchmark --model M --drafter D --output DIR`.

Beam widths 1 to 4 and lengths 2 to 5 (Apple's count, with the init token), greedy and sampled, in each floating-point
type and quantised. Two CSV files have Apple's columns, then ours; `surface` draws them. The baseline is mlx-lm as its
users run it, which prepares a token while the one before is computed. Apple's own loop waited for every token: it is
the `ours` of the first file. Ends of texts are ignored, so that every run has the same number of tokens.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx import nn
from mlx_lm.generate import generate_step as stock_generate_step

from mlx_port import options, surface
from mlx_port.beam_search import BeamShape
from mlx_port.checkpoint import load_drafter
from mlx_port.config import MAX_NODES
from mlx_port.decoding import generate_step
from mlx_port.drafter import ReDrafter
from mlx_port.plan import Plan
from mlx_port.runs import Autoregression, Drafting, autoregression, drafting, timed
from mlx_port.target import Target
from mlx_port.tree_forward import Mode

DTYPES = {"fp16": mx.float16, "bf16": mx.bfloat16, "fp32": mx.float32, "q4": None}
_PROMPT = "USER: Tell me about a week on an island: where you went, what you ate and whom you met. ASSISTANT:"
_GROUP_SIZE = 64


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return options.run(_make_parser(), _run, arguments)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mlx_port.benchmark", description="Sweep widths, lengths and types")
    parser.add_argument("--model", required=True, help="target, not quantised (q4 is made here)")
    parser.add_argument("--drafter", required=True, help="its drafter")
    parser.add_argument("--output", type=Path, required=True, help="directory for CSV files and drawings")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16", "bf16", "q4"], help="fp16 bf16 q4")
    parser.add_argument("--widths", nargs="+", type=int, default=[1, 2, 3, 4], help="beam widths (1 2 3 4)")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2, 3, 4, 5], help="with the init token (2 3 4 5)")
    parser.add_argument("--prompt", default=_PROMPT)
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens per run (200)")
    parser.add_argument("--runs", type=int, default=2, help="runs of every setting (2)")
    return parser


def _run(args: argparse.Namespace) -> None:
    for name, value, least in (
        ("--runs", args.runs, 1),
        # the first token's time is the prompt's
        ("--max-tokens", args.max_tokens, 2),
        ("--widths", min(args.widths), 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}, but it must be {least} or more")
    for length in args.lengths:
        if length < 2:
            raise ValueError(f"a beam length is {length}, but it counts the init token: it must be 2 or more")
    args.output.mkdir(parents=True, exist_ok=True)
    draftings: list[Drafting] = []
    autoregressions: list[Autoregression] = []
    for name in args.dtypes:
        target, tokenizer, drafter = load_as(args.model, args.drafter, name)
        prompt = tokenizer.encode(args.prompt)
        for greedy in (True, False):
            _warm_up(target, drafter, prompt)
            undrafted = [autoregression(target, prompt, args.max_tokens, run, name, greedy) for run in range(args.runs)]
            autoregressions += undrafted
            _write(args.output / "autoregression.csv", autoregressions)
            baseline = mean((row.num_tokens - 1) * 1000 / row.generation_mlx for row in undrafted)
            for width, length, run in itertools.product(args.widths, args.lengths, range(args.runs)):
                plan = _plan(width, length, target.mode)
                row = drafting(target, drafter, prompt, args.max_tokens, run, name, greedy, plan, baseline)
                draftings.append(row)
                _write(args.output / "recurrent_drafting.csv", draftings)
                print(f"{name} width {width} length {length} {row.tokens_per_second:.1f} tok/s", file=sys.stderr)
    files = surface.draw([asdict(row) for row in draftings], args.output)
    best = max(draftings, key=lambda row: row.speedup)
    print(json.dumps({**_provenance(), "best": asdict(best), "files": [str(file) for file in files]}))


def load_as(model: str, drafter: str, dtype: str) -> tuple[Target, Any, ReDrafter]:
    """Return a pair in one of `DTYPES`; where the target is quantised, the drafter is too.

    Raises:
        ValueError: the model on disk is quantised already, so that it has no other type.
    """
    stock, tokenizer = mlx_lm.load(model)[:2]
    is_quantised = any(isinstance(module, nn.QuantizedLinear) for module in stock.modules())
    floating = DTYPES[dtype]
    if floating is None and not is_quantised:
        nn.quantize(stock, group_size=_GROUP_SIZE, bits=4, class_predicate=_can_be_quantised)
    elif floating is not None:
        if is_quantised:
            raise ValueError(f"{model!r} is quantised, so it cannot run as {dtype}: pass `--dtypes q4`")
        stock.set_dtype(floating)
    target = Target(stock)
    loaded = load_drafter(drafter, dtype=target.dtype, bits=4 if floating is None else None, group_size=_GROUP_SIZE)
    target.lend(loaded)
    return target, tokenizer, loaded


def _can_be_quantised(_: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % _GROUP_SIZE == 0


def _plan(width: int, length: int, mode: Mode) -> Plan:
    # as many nodes as Apple's beams had, without their shared beginnings
    nodes = min(MAX_NODES, width * (length - 1))
    return Plan(BeamShape(1 if mode.takes_chains_only else width, length - 1), nodes)


def _warm_up(target: Target, drafter: ReDrafter, prompt: list[int]) -> None:
    # weights are read and kernels compiled when they are first used
    timed(generate_step(mx.array(prompt), target, drafter, max_tokens=4))
    timed(stock_generate_step(mx.array(prompt), target.model, max_tokens=4))


def _write(path: Path, rows: list[Any]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _provenance() -> dict[str, Any]:
    device = str(mx.default_device())
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "device": device,
        "mlx": metadata.version("mlx"),
        "mlx_lm": metadata.version("mlx-lm"),
        "command": " ".join(sys.argv),
    }


if __name__ == "__main__":
    sys.exit(main())
