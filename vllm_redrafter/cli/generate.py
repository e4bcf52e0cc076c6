"""`generate`: answers to prompts from the command line, a file or a conversation, with or without the drafter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_redrafter.cli import chat, options
from vllm_redrafter.cli.answers import AnswerWriter, answer_all
from vllm_redrafter.cli.engine import Engine, EngineSpec
from vllm_redrafter.cli.errors import USAGE, CommandError
from vllm_redrafter.cli.generation import Generation, tokens_per_step
from vllm_redrafter.cli.progress import Progress
from vllm_redrafter.cli.prompts import Conversation, read_conversations


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "generate",
        help="answer prompts, or chat",
        description="Answers prompts with the drafter, or with --baseline by the target alone.",
        allow_abbrev=False,
    )
    options.add_pair(parser, drafter_required=False)
    parser.add_argument("--baseline", action="store_true", help="the target alone, without a drafter")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="P", action="append", help="text to answer; may be repeated")
    source.add_argument("--prompts", metavar="FILE", type=Path, help="text, JSONL, MT-Bench or ShareGPT")
    source.add_argument("--interactive", action="store_true", help="chat; `exit` or Ctrl-D ends it")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the answers as JSONL (default: print them)")
    parser.add_argument("--raw", action="store_true", help="continue the text, also where there is a chat template")
    count = options.positive_int
    parser.add_argument("--max-tokens", metavar="N", type=count, default=256, help="per answer (default: 256)")
    parser.add_argument("--temperature", metavar="X", type=options.number, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", metavar="P", type=options.probability, default=1.0, help="nucleus (default: 1)")
    parser.add_argument("--seed", metavar="N", type=int, help="the same text again with the same seed")
    parser.add_argument("--batch-size", metavar="N", type=count, default=8, help="prompts at once (default: 8)")
    parser.add_argument("--num-speculative-tokens", metavar="N", type=options.node_budget, help="most nodes, 1..63")
    parser.add_argument("--beam-width", metavar="N", type=options.node_budget, help="beams searched; 1 drafts a chain")
    parser.add_argument("--draft-length", metavar="N", type=options.node_budget, help="tokens drafted per beam")
    options.add_engine(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    spec = _spec(arguments)
    conversations = _conversations(arguments)
    sampling = {
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "max_tokens": arguments.max_tokens,
        "seed": arguments.seed,
    }
    progress = Progress()
    method = "baseline" if arguments.baseline else "redrafter"
    with AnswerWriter(arguments.output, method) as writer:
        progress.say(f"starting the engine for {arguments.target}")
        with Engine(spec, verbose=arguments.verbose) as engine:
            progress.clear()
            if arguments.interactive:
                generation = chat.converse(engine, sampling, writer, raw=arguments.raw)
            else:
                generation = answer_all(engine, conversations, sampling, writer, progress, raw=arguments.raw)
    progress.clear()
    print(json.dumps(_summary(generation, method, arguments.output)))
    errors = [answer.error for answer in generation.answers if answer.error is not None]
    if errors and len(errors) == len(generation.answers):
        raise CommandError(f"no prompt could be answered, the first because {errors[0]}")
    return 0


def _spec(arguments: argparse.Namespace) -> EngineSpec:
    if arguments.baseline == (arguments.drafter is not None):
        raise CommandError("pass either --drafter or --baseline", USAGE)
    options.check_model("--target", arguments.target)
    config = None
    if arguments.drafter is not None:
        options.check_model("--drafter", arguments.drafter)
        config = options.speculative_config(
            arguments.drafter,
            num_speculative_tokens=arguments.num_speculative_tokens,
            beam_width=arguments.beam_width,
            draft_length=arguments.draft_length,
        )
    batch_size = 1 if arguments.interactive else arguments.batch_size
    unseeded = arguments.seed is None
    return EngineSpec(arguments.target, config, arguments.dtype, batch_size, enable_chunked_prefill=unseeded)


def _conversations(arguments: argparse.Namespace) -> list[Conversation]:
    if arguments.prompts is not None:
        return read_conversations(arguments.prompts)
    return [Conversation((prompt,)) for prompt in arguments.prompt or ()]


def _summary(generation: Generation, method: str, output: Path | None) -> dict[str, Any]:
    return {
        "num_prompts": len(generation.answers),
        "num_errors": sum(answer.error is not None for answer in generation.answers),
        "tokens": generation.num_tokens,
        "tokens_per_second": round(generation.num_tokens / generation.seconds, 2) if generation.seconds else None,
        "tokens_per_step": tokens_per_step(generation.answers),
        "method": method,
        "output": None if output is None else str(output),
    }
