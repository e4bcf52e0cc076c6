"""The flags that our programs share, with mlx-lm's names where mlx-lm has them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.sample_utils import make_sampler

from mlx_port.calibration import Calibration, Pace, calibrate
from mlx_port.pair import Pair, load
from mlx_port.target import Target

DEFAULT_MODEL = "mlx-community/Llama-3.2-3B-Instruct-4bit"
"""mlx-lm's own."""

_INTERRUPTED = 130
"""Exit status: 128 and the number of SIGINT."""


def run(
    parser: argparse.ArgumentParser, program: Callable[[argparse.Namespace], None], arguments: list[str] | None
) -> int:
    """Run a program with its arguments and return its exit status; what a user got wrong is one line on stderr."""
    args = parser.parse_args(arguments)
    try:
        program(args)
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # the line that was being written ends here
        print("\ninterrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Add what says which models work together, and how."""
    parser.add_argument("--model", help=f"target: directory or Hub id, as mlx_lm takes it ({DEFAULT_MODEL})")
    parser.add_argument("--drafter", "--draft-model", required=True, help="ReDrafter drafter: directory or Hub id")
    parser.add_argument("--drafter-bits", type=int, choices=(4, 8), help="quantise the drafter")
    parser.add_argument("--drafter-group-size", type=int, default=64, help="weights that share a scale (64)")
    parser.add_argument("--beam-width", type=int, help="beams searched (the drafter's own)")
    parser.add_argument(
        "--draft-length", "--num-draft-tokens", type=int, help="tokens drafted per beam (the drafter's own)"
    )
    parser.add_argument(
        "--tree-budget",
        type=int,
        help="most tree nodes verified per step, 1..63 (tried out; the drafter's own with --seed and --temp)",
    )
    parser.add_argument("--recurrent", action="store_true", help="take a target with recurrent layers too")
    parser.add_argument("--adapter-path", help="LoRA adapter of the target")
    parser.add_argument(
        "--quantize-activations", "-qa", action="store_true", help="as the weights of the target's layers are"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer run its own code")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add what says how tokens are drawn."""
    parser.add_argument("--temp", type=float, default=0.0, help="temperature; 0 takes the best token (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (1)")
    parser.add_argument("--min-p", type=float, default=0.0, help="least share of the best token's probability (0)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the best tokens only; 0 for all (0)")
    parser.add_argument("--min-tokens-to-keep", type=int, default=1, help="tokens that min-p always keeps (1)")
    parser.add_argument("--xtc-probability", type=float, default=0.0, help="chance that XTC is applied to a token (0)")
    parser.add_argument("--xtc-threshold", type=float, default=0.1, help="probability from which XTC excludes (0.1)")
    parser.add_argument("--seed", type=int, help="of MLX's random numbers")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add what says how keys and values are kept."""
    parser.add_argument("--max-kv-size", type=int, help="most tokens that the cache holds")
    parser.add_argument("--kv-bits", type=int, help="quantise the cache")
    parser.add_argument("--kv-group-size", type=int, default=64, help="numbers that share a scale (64)")
    parser.add_argument("--quantized-kv-start", type=int, default=5000, help="tokens from which on it is done (5000)")
    parser.add_argument("--prefill-step-size", type=int, default=2048, help="prompt tokens read at a time (2048)")


def load_pair(args: argparse.Namespace, model: str | None, tokenizer_config: dict[str, Any]) -> Pair:
    """Return the models that the flags of `add_pair` name; `model` may come from elsewhere."""
    if args.quantize_activations and not hasattr(nn, "QQLinear"):
        raise ValueError(
            f"MLX {mx.__version__} cannot quantise activations: leave out --quantize-activations or update"
        )
    return load(
        model or DEFAULT_MODEL,
        args.drafter,
        drafter_bits=args.drafter_bits,
        drafter_group_size=args.drafter_group_size,
        recurrent=args.recurrent,
        adapter_path=args.adapter_path,
        model_config={"quantize_activations": True} if args.quantize_activations else {},
        tokenizer_config={**tokenizer_config, "trust_remote_code": args.trust_remote_code},
    )


def sampler(args: argparse.Namespace, tokenizer: Any) -> Callable[[mx.array], mx.array] | None:
    """Return mlx-lm's sampler for the flags of `add_sampling`, or None where the best token is taken."""
    if args.temp < 0:
        raise ValueError(f"--temp is {args.temp}, but it must be 0 or more: 0 takes the best token")
    if args.temp == 0:
        return None
    drawn: Callable[[mx.array], mx.array] = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
    )
    return drawn


def calibration(args: argparse.Namespace, target: Target) -> Calibration | None:
    """Return what forwards cost here, or None where nothing may hang on that.

    That is where a tree budget was given, and where a seed asks for the same sampled text again: which random numbers
    are drawn depends on the tree.
    """
    is_seeded = args.seed is not None and args.temp > 0
    return None if is_seeded or args.tree_budget is not None else calibrate(target)


def step_options(args: argparse.Namespace, measured: Calibration | None) -> dict[str, Any]:
    """Return the arguments of `stream_generate` for one text that `add_pair`, `add_cache` and a calibration give."""
    if measured is None:
        drafting: dict[str, Any] = {"tree_budget": args.tree_budget}
    else:
        drafting = {"tree_budget": measured.tree_budget, "pace": Pace(measured.baseline_seconds)}
    names = (
        "beam_width",
        "draft_length",
        "max_kv_size",
        "kv_bits",
        "kv_group_size",
        "quantized_kv_start",
        "prefill_step_size",
    )
    return {**drafting, **{name: getattr(args, name) for name in names}}


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether `apply_chat_template` will do."""
    # mlx-lm 0.28 has no such field, nor templates but the tokenizer's
    return bool(getattr(tokenizer, "has_chat_template", tokenizer.chat_template is not None))


def boolean(text: str) -> bool:
    """Return what mlx-lm makes of `--verbose TEXT`."""
    return text.lower() not in ("false", "f")
