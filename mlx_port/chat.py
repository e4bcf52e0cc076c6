"""A conversation in the terminal: `python -m mlx_port.chat --model M --drafter D`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mlx_port import options
from mlx_port.pair import Pair
from mlx_port.stream import stream_generate
from mlx_port.telemetry import Telemetry

_HELP = "q leaves, r starts afresh, h says this"


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return options.run(_make_parser(), _run, arguments)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mlx_port.chat", description="Chat with a model and its drafter")
    options.add_pair(parser)
    options.add_sampling(parser)
    options.add_cache(parser)
    parser.add_argument("--max-tokens", "-m", type=int, default=256, help="most tokens per answer (256)")
    parser.add_argument("--system-prompt", help="system message of the conversation")
    return parser


def _run(args: argparse.Namespace) -> None:
    mx.random.seed(args.seed or 0)
    pair = options.load_pair(args, args.model, {})
    if not options.has_chat_template(pair.tokenizer):
        raise ValueError(f"{args.model!r} has no chat template: take one that has, or `python -m mlx_port.generate`")
    measured = options.calibration(args, pair.target)
    print(_HELP)
    prompt_cache = pair.target.make_caches(args.max_kv_size)
    is_first = True
    for query in _queries():
        if query == "h":
            print(_HELP)
        elif query == "r":
            prompt_cache, is_first = pair.target.make_caches(args.max_kv_size), True
        else:
            step_options = options.step_options(args, measured)
            _answer(pair, args, query, is_first, prompt_cache=prompt_cache, **step_options)
            is_first = False


def _queries() -> Iterator[str]:
    while True:
        try:
            query = input(">> ")
        except EOFError:
            return
        if query == "q":
            return
        yield query


def _answer(pair: Pair, args: argparse.Namespace, query: str, is_first: bool, **step_options: Any) -> None:
    """Print the answer; the conversation so far is in the caches, and then the answer too."""
    messages = [{"role": "user", "content": query}]
    if is_first and args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    telemetry = Telemetry()
    # by way of the text: as tokens, mlx-lm's versions and transformers' return different things
    text = pair.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for response in stream_generate(
        pair.target,
        pair.tokenizer,
        pair.tokenizer.encode(text, add_special_tokens=False),
        pair.drafter,
        max_tokens=args.max_tokens,
        sampler=options.sampler(args, pair.tokenizer),
        telemetry=telemetry,
        **step_options,
    ):
        print(response.text, end="", flush=True)
    print(f"\n[{telemetry.mean_emitted_tokens_per_target_call:.2f} tokens per forward]")


if __name__ == "__main__":
    sys.exit(main())
