"""`mlx_lm.generate` with a drafter: `python -m mlx_port.generate --help`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache

from mlx_port import options
from mlx_port.stream import stream_generate
from mlx_port.telemetry import Telemetry


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return options.run(_make_parser(), _run, arguments)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mlx_port.generate", description="Generate text with a drafter")
    options.add_pair(parser)
    options.add_sampling(parser)
    options.add_cache(parser)
    parser.add_argument("--prompt", "-p", default="hello", help="text to answer; '-' reads it from standard input")
    parser.add_argument("--system-prompt", help="system message of the chat template")
    parser.add_argument("--prefill-response", help="beginning of the answer")
    parser.add_argument("--max-tokens", "-m", type=int, default=100, help="most tokens to generate (100)")
    parser.add_argument("--ignore-chat-template", action="store_true", help="take the prompt as it is")
    parser.add_argument(
        "--use-default-chat-template",
        action="store_true",
        help="where the tokenizer brings no template, the one that transformers has for it",
    )
    parser.add_argument(
        "--chat-template-config",
        type=_json_object,
        help="JSON object of further arguments of the chat template",
    )
    parser.add_argument("--image", nargs="+", default=(), help="mlx-lm's; refused, as drafts are for text")
    parser.add_argument("--extra-eos-token", nargs="+", default=(), help="more tokens that end the text")
    parser.add_argument("--prompt-cache-file", help="caches saved by `mlx_lm.cache_prompt`, read before the prompt")
    parser.add_argument(
        "--verbose", type=options.boolean, default=True, help="also print counts and speed; 'F' for the text alone"
    )
    return parser


def _json_object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be a JSON object of template arguments")
    return fields


def _run(args: argparse.Namespace) -> None:
    if args.seed is not None:
        mx.random.seed(args.seed)
    if args.image:
        raise ValueError(f"--image is {args.image}, but a drafter does not read images: ask mlx_lm alone")
    prompt_cache, metadata = _load_prompt_cache(args)
    tokenizer_config = json.loads(metadata["tokenizer_config"]) if "tokenizer_config" in metadata else {}
    target, tokenizer, drafter = options.load_pair(args, args.model or metadata.get("model"), tokenizer_config)
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    telemetry = Telemetry()
    response = None
    for response in stream_generate(
        target,
        tokenizer,
        _prompt(args, tokenizer, follows_a_cache=prompt_cache is not None),
        drafter,
        max_tokens=args.max_tokens,
        sampler=options.sampler(args, tokenizer),
        prompt_cache=prompt_cache,
        telemetry=telemetry,
        **options.step_options(args, options.calibration(args, target)),
    ):
        print(response.text, end="", flush=True)
    print()
    if args.verbose and response is not None:
        print("=" * 10)
        print(f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec")
        print(f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec")
        print(f"Peak memory: {response.peak_memory:.3f} GB")
        print(
            f"Drafting: {telemetry.mean_emitted_tokens_per_target_call:.2f} tokens per forward, "
            f"{telemetry.accepted_draft_token_count} of {telemetry.draft_token_count} drafts accepted"
        )


def _load_prompt_cache(args: argparse.Namespace) -> tuple[list[Any] | None, dict[str, str]]:
    if args.prompt_cache_file is None:
        return None, {}
    if not Path(args.prompt_cache_file).is_file():
        raise ValueError(f"no prompt cache at {args.prompt_cache_file!r}: make one with `mlx_lm.cache_prompt`")
    try:
        prompt_cache, metadata = load_prompt_cache(args.prompt_cache_file, return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{args.prompt_cache_file!r} is no prompt cache ({error}): make one with `mlx_lm.cache_prompt`"
        ) from None
    if args.model not in (None, metadata["model"]):
        raise ValueError(
            f"--model is {args.model!r}, but the prompt cache was made with {metadata['model']!r}: give the same model"
        )
    first = prompt_cache[0]
    asked = (args.kv_bits, args.kv_group_size)
    if isinstance(first, QuantizedKVCache) and args.kv_bits is not None and asked != (first.bits, first.group_size):
        raise ValueError(
            f"the prompt cache has {first.bits} bits in groups of {first.group_size}: "
            "give the same --kv-bits and --kv-group-size, or neither"
        )
    return prompt_cache, metadata


def _prompt(args: argparse.Namespace, tokenizer: Any, *, follows_a_cache: bool) -> list[int]:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    has_template = options.has_chat_template(tokenizer)
    if args.use_default_chat_template and not has_template:
        _take_default_template(tokenizer)
        has_template = True
    if args.ignore_chat_template or not has_template:
        return tokenizer.encode(prompt)
    text = _templated(args, tokenizer, prompt)
    if follows_a_cache:
        # the template's beginning is in the cache already
        text = text[_templated(args, tokenizer, "<query>").index("<query>") :]
    return tokenizer.encode(text, add_special_tokens=False)


def _take_default_template(tokenizer: Any) -> None:
    # transformers had them up to 4.43
    template = getattr(tokenizer, "default_chat_template", None)
    if template is None:
        raise ValueError(
            "--use-default-chat-template: neither this tokenizer nor transformers has a chat template for it; "
            "leave the flag out, and the prompt is taken as it is"
        )
    tokenizer.chat_template = template


def _templated(args: argparse.Namespace, tokenizer: Any, prompt: str) -> str:
    messages = [
        {"role": role, "content": content}
        for role, content in (("system", args.system_prompt), ("user", prompt), ("assistant", args.prefill_response))
        if content is not None
    ]
    has_prefill = args.prefill_response is not None
    text: str = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        continue_final_message=has_prefill,
        add_generation_prompt=not has_prefill,
        **(args.chat_template_config or {}),
    )
    return text


if __name__ == "__main__":
    sys.exit(main())
