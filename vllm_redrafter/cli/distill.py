"""`distill`: the target answers prompts, and its answers become training data, token by token as it wrote them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_redrafter.cli import options
from vllm_redrafter.cli.engine import Engine, EngineSpec
from vllm_redrafter.cli.errors import USAGE, CommandError
from vllm_redrafter.cli.generation import Answer, Prompt, join
from vllm_redrafter.cli.progress import Progress
from vllm_redrafter.cli.prompts import Conversation, parse_conversation, read_entries

if TYPE_CHECKING:
    from vllm_redrafter.training.dialogue import Dialogue, Encode
    from vllm_redrafter.training.distillation import Ask, OnReply, Question
    from vllm_redrafter.training.distilled_file import DistilledFile

_ROUNDS = 16
"""How many times `--batch-size` conversations are under way: the engine seldom waits for the last of them."""


def add_parser(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "distill",
        help="have the target answer prompts, as training data",
        description="Writes the target's own answers to prompts as training data. A run that was killed goes on with "
        "--resume; prompts without an answer go to a file beside, with the reason.",
        allow_abbrev=False,
    )
    options.add_pair(parser, drafter_required=False)
    parser.add_argument("--prompts", metavar="FILE", type=Path, required=True, help="text, JSONL, MT-Bench or ShareGPT")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="the data, as .jsonl")
    present = parser.add_mutually_exclusive_group()
    present.add_argument("--resume", action="store_true", help="answer what OUTPUT does not hold yet")
    present.add_argument("--overwrite", action="store_true", help="replace OUTPUT")
    parser.add_argument("--raw", action="store_true", help="continue the text, also where there is a chat template")
    count = options.positive_int
    parser.add_argument(
        "--openings",
        metavar="N,...",
        type=options.list_of(count),
        help="prompts are the first N tokens of each text in FILE, each different one once; implies --raw",
    )
    parser.add_argument("--max-tokens", metavar="N", type=count, default=512, help="per answer (default: 512)")
    parser.add_argument("--max-model-len", metavar="N", type=count, help="of prompt and answer (default: the target's)")
    parser.add_argument("--temperature", metavar="X", type=options.number, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", metavar="P", type=options.probability, default=1.0, help="nucleus (default: 1)")
    parser.add_argument("--seed", metavar="N", type=int, help="the same text again with the same seed")
    parser.add_argument("--batch-size", metavar="N", type=count, default=32, help="prompts at once (default: 32)")
    options.add_engine(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    spec = _spec(arguments)
    _check_output(arguments)
    # no template knows what the beginning of a text is
    arguments.raw |= arguments.openings is not None
    entries = _entries(arguments)

    from vllm_redrafter.training.distillation import distill

    encode = _encoder(_tokenizer(arguments.target), raw=arguments.raw)
    progress = Progress()
    with _open(arguments) as output:
        dialogues = _dialogues(entries, arguments.prompts, output)
        num_before, meter = output.num_tokens, _Meter(len(entries) - len(dialogues), len(entries), progress)
        if dialogues:
            progress.say(f"starting the engine for {arguments.target}")
            with Engine(spec, verbose=arguments.verbose) as engine:
                progress.clear()
                together = _ROUNDS * arguments.batch_size
                ask = _asker(engine, arguments, meter)
                distill(dialogues, encode, ask, output, num_together=together, on_finished=meter.count)
        num_new = output.num_tokens - num_before
    progress.clear()
    summary = {
        "output": str(arguments.output),
        "num_records": output.num_records,
        "num_failed": output.num_failed,
        "num_tokens": output.num_tokens,
        "tokens_per_second": round(num_new / meter.seconds, 2) if meter.seconds else None,
    }
    print(json.dumps(summary))
    if not output.num_records:
        raise CommandError(f"no prompt could be answered: {output.failed_path} says why")
    return 0


@dataclass
class _Meter:
    """How far a run is, and how long its target was at work."""

    num_finished: int
    total: int
    progress: Progress
    seconds: float = 0.0

    def count(self) -> None:
        self.num_finished += 1
        self.progress.count("answered", self.num_finished, self.total)


def _spec(arguments: argparse.Namespace) -> EngineSpec:
    options.check_model("--target", arguments.target)
    config = None
    if arguments.drafter is not None:
        options.check_model("--drafter", arguments.drafter)
        config = options.speculative_config(arguments.drafter)
    return EngineSpec(
        arguments.target,
        config,
        arguments.dtype,
        arguments.batch_size,
        enable_chunked_prefill=arguments.seed is None,
        max_model_len=arguments.max_model_len,
    )


def _check_output(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    if output.suffix != ".jsonl":
        raise CommandError(f"--output {str(output)!r} is no .jsonl: name it so, as training goes by the name", USAGE)
    if output.exists() and not (arguments.resume or arguments.overwrite):
        raise CommandError(f"{output} is there already: pass --resume to go on with it or --overwrite to replace it")


def _entries(arguments: argparse.Namespace) -> list[tuple[Any, str]]:
    if arguments.openings is None:
        return read_entries(arguments.prompts)
    from vllm_redrafter.training.openings import cut_openings
    from vllm_redrafter.training.records import read_records

    path: Path = arguments.prompts
    texts = []
    try:
        for number, record in enumerate(read_records(path), 1):
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise CommandError(f"{path}, entry {number}: no text to cut: leave out --openings for prompts", USAGE)
            texts.append(record["text"])
    except ValueError as error:
        raise CommandError(str(error)) from None
    openings = cut_openings(texts, arguments.openings, _tokenizer(arguments.target))
    entries = [(opening, f"{path}, opening {number}") for number, opening in enumerate(openings, 1)]
    if not entries:
        raise CommandError(f"no text in {path} has more than {min(arguments.openings)} tokens: pass shorter --openings")
    return entries


@cache
def _tokenizer(target: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(target)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"no tokenizer for {target!r} ({reason}): pass a target that has one") from None


def _encoder(tokenizer: Any, *, raw: bool) -> Encode:
    def encode(messages: Sequence[dict[str, Any]]) -> list[int]:
        if raw or not tokenizer.chat_template:
            return list(tokenizer.encode(join(messages)))
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    return encode


def _open(arguments: argparse.Namespace) -> DistilledFile:
    from vllm_redrafter.training.distilled_file import DistilledFile, failed_path

    settings = ("target", "raw", "temperature", "top_p", "seed", "max_tokens")
    try:
        if arguments.overwrite:
            arguments.output.unlink(missing_ok=True)
        if not arguments.resume:
            failed_path(arguments.output).unlink(missing_ok=True)
        return DistilledFile(arguments.output, {name: getattr(arguments, name) for name in settings})
    except OSError as error:
        raise CommandError(f"cannot write {str(arguments.output)!r}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(str(error)) from None


def _dialogues(entries: Sequence[tuple[Any, str]], prompts: Path, output: DistilledFile) -> list[Dialogue]:
    """Return the conversations that are not in the file yet; an entry that is none goes to the one beside."""
    from vllm_redrafter.training.dialogue import Dialogue

    dialogues = []
    for index, (entry, where) in enumerate(entries):
        error = None
        try:
            conversation = parse_conversation(entry, where)
        except CommandError as reason:
            conversation, error = Conversation(()), str(reason)
        own = [entry[key] for key in ("source", "category") if key in entry] if isinstance(entry, dict) else []
        source = own[0] if own and isinstance(own[0], str) else prompts.stem
        dialogue = Dialogue(index, conversation.turns, system=conversation.system, source=source)
        try:
            is_finished = output.has(dialogue)
        except ValueError as other_prompts:
            raise CommandError(str(other_prompts)) from None
        if error is not None and not is_finished:
            output.write(dialogue, error)
        elif not is_finished:
            dialogues.append(dialogue)
    return dialogues


def _asker(engine: Engine, arguments: argparse.Namespace, meter: _Meter) -> Ask:
    from vllm_redrafter.training.distillation import Reply

    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_p", "max_tokens")}

    def ask(questions: Sequence[Question], on_reply: OnReply) -> None:
        def reply(number: int, answer: Answer) -> None:
            on_reply(number, Reply(answer.token_ids, answer.text, answer.error))

        prompts = [Prompt(token_ids=tuple(item.token_ids), seed=_seed(arguments.seed, item)) for item in questions]
        meter.seconds += engine.generate(prompts, sampling, on_answer=reply).seconds

    return ask


def _seed(seed: int | None, question: Question) -> int | None:
    """Return a prompt's own seed: the same whether the run was resumed or not."""
    return None if seed is None else seed + 1000 * question.conversation + question.turn
