"""Distillation: a target answers prompts, and what it wrote becomes training data.

How the target is run is handed in. With vLLM in the same process, `ask` is

    def ask(questions, on_reply):
        prompts = [{"prompt_token_ids": question.token_ids} for question in questions]
        for number, output in enumerate(llm.generate(prompts, SamplingParams(max_tokens=512))):
            on_reply(number, Reply(output.outputs[0].token_ids, output.outputs[0].text))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jinja2 import TemplateError

from vllm_redrafter.training.dialogue import Dialogue, Encode
from vllm_redrafter.training.distilled_file import DistilledFile


class Question(NamedTuple):
    """A prompt for the target."""

    token_ids: list[int]
    conversation: int
    """Index of the conversation."""
    turn: int
    """Which of its answers is asked for, from 0."""


class Reply(NamedTuple):
    """What the target wrote, or why it could not."""

    token_ids: Sequence[int]
    text: str
    error: str | None = None


OnReply = Callable[[int, Reply], None]
Ask = Callable[[Sequence[Question], OnReply], None]
"""Has questions answered, and hands on each reply with the number of its question as soon as it is there."""


def distill(
    dialogues: Sequence[Dialogue],
    encode: Encode,
    ask: Ask,
    output: DistilledFile,
    *,
    num_together: int = 512,
    on_finished: Callable[[], None] = lambda: None,
) -> None:
    """Write the target's answers to all conversations, each when its last turn is answered.

    Args:
        encode: makes prompts; what its template refuses is written with the reason.
        num_together: conversations under way at once; their turns are asked in turn, first ones first.
        on_finished: called when a conversation is written.
    """

    def finish(dialogue: Dialogue, error: str | None = None) -> None:
        output.write(dialogue, error)
        on_finished()

    def answer_next_turns(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
        """Return the conversations that have a turn more."""
        asked: list[tuple[Dialogue, Question]] = []
        unfinished: list[Dialogue] = []

        def take(number: int, reply: Reply) -> None:
            dialogue, question = asked[number]
            if reply.error is not None:
                finish(dialogue, reply.error)
                return
            dialogue.take(question.token_ids, reply.token_ids, reply.text)
            if dialogue.is_complete:
                finish(dialogue)
            else:
                unfinished.append(dialogue)

        for dialogue in dialogues:
            question = _question(dialogue, encode)
            if isinstance(question, Question):
                asked.append((dialogue, question))
            else:
                finish(dialogue, question)
        if asked:
            ask([question for _, question in asked], take)
        return unfinished

    for start in range(0, len(dialogues), num_together):
        under_way = list(dialogues[start : start + num_together])
        while under_way:
            under_way = answer_next_turns(under_way)


def _question(dialogue: Dialogue, encode: Encode) -> Question | str:
    """Return what to ask next, or why nothing can be asked."""
    try:
        token_ids = dialogue.next_prompt(encode)
    except TemplateError as error:
        return f"the chat template refuses it ({error.message})"
    if not token_ids:
        return "the prompt is empty"
    return Question(token_ids, dialogue.index, dialogue.num_answered)
