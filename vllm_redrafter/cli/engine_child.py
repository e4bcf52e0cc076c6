"""The child process of `engine.Engine`: `python -m vllm_redrafter.cli.engine_child FD`.

Reads JSON lines from stdin, the engine's spec first, and writes JSON lines to the file descriptor FD; it ends when
stdin does. An exception goes to stderr, which is the engine's log, and ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

from vllm_redrafter.cli.generation import join


def main() -> None:
    """Serve one engine until stdin ends."""
    events = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    os.set_inheritable(events.fileno(), False)
    server = Server(json.loads(sys.stdin.readline()), events)
    for line in sys.stdin:
        command = json.loads(line)
        if command["command"] == "generate":
            server.generate(command["prompts"], command["sampling"], command["stream"])
        else:
            server.decode(command["sequences"])


@dataclass
class Running:
    """A request under way."""

    started: float
    text: str = ""
    shown: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_emissions: int = 0
    logprobs: list[dict[str, float]] | None = None


class Server:
    """An engine with its requests, stepped here so that what every step emitted is seen."""

    def __init__(self, spec: dict[str, Any], events: TextIO) -> None:
        from vllm import LLM

        self._events = events
        self._has_drafter = (spec["speculative_config"] or {}).get("method") == "redrafter"
        self._llm = LLM(spec.pop("target"), **spec)
        self._tokenizer: Any = self._llm.get_tokenizer()
        self._max_model_len = self._llm.llm_engine.model_config.max_model_len
        self._num_requests = 0
        self._send({"event": "ready"})

    def generate(self, prompts: list[dict[str, Any]], sampling: dict[str, Any], stream: bool) -> None:
        """Answer all prompts, running together; an answer is sent when it is complete, "done" at the end."""
        before = self._stats()
        started = time.perf_counter()
        running: dict[str, tuple[int, Running]] = {}
        for index, prompt in enumerate(prompts):
            self._num_requests += 1
            request_id = str(self._num_requests)
            error = self._add(request_id, prompt, sampling)
            if error is None:
                running[request_id] = (index, Running(time.perf_counter()))
            else:
                answer = {"text": "", "token_ids": [], "num_steps": 0, "seconds": 0.0, "error": error}
                self._send({"event": "answer", "index": index, "answer": answer})
        while running:
            for output in self._llm.llm_engine.step():
                index, request = running[output.request_id]
                pieces = self._advance(request, output.outputs[0], stream)
                if pieces:
                    self._send({"event": "pieces", "pieces": pieces})
                if output.finished:
                    self._finish(index, request)
                    del running[output.request_id]
        seconds = time.perf_counter() - started
        stats = {name: value - before.get(name, 0) for name, value in self._stats().items()}
        self._send({"event": "done", "seconds": seconds, "stats": stats})

    def decode(self, sequences: list[list[int]]) -> None:
        """Send the texts of token sequences."""
        self._send({"event": "decoded", "texts": [self._tokenizer.decode(ids) for ids in sequences]})

    def _add(self, request_id: str, prompt: dict[str, Any], sampling: dict[str, Any]) -> str | None:
        """Hand a prompt to the engine; return why not, where the prompt is the reason."""
        from jinja2 import TemplateError
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        try:
            token_ids = self._encode(prompt)
        except TemplateError as error:
            # some templates know no system messages
            return f"the chat template refuses it ({error.message})"
        if not token_ids:
            return "the prompt is empty: give the model something to continue"
        if len(token_ids) >= self._max_model_len:
            return (
                f"the prompt has {len(token_ids)} tokens, but prompt and answer together may have "
                f"{self._max_model_len}: shorten it"
            )
        seeded = {**sampling, "seed": prompt["seed"]} if "seed" in prompt else sampling
        params = SamplingParams(**seeded, output_kind=RequestOutputKind.DELTA)
        try:
            self._llm.llm_engine.add_request(request_id, {"prompt_token_ids": token_ids}, params)
        except ValueError as error:
            return str(error)
        return None

    def _encode(self, prompt: dict[str, Any]) -> list[int]:
        if "token_ids" in prompt:
            return list(prompt["token_ids"])
        messages = prompt.get("messages")
        if messages is None:
            return list(self._tokenizer.encode(prompt["text"]))
        if getattr(self._tokenizer, "chat_template", None):
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        # a model without a chat template continues the text so far
        return list(self._tokenizer.encode(join(messages)))

    def _advance(self, request: Running, output: Any, stream: bool) -> list[tuple[str, bool]]:
        """Take in what a step emitted; return it as pieces of text, each with whether it was drafted."""
        request.text += output.text
        request.num_emissions += bool(output.token_ids)
        if output.logprobs is not None:
            request.logprobs = request.logprobs or []
            for position in output.logprobs:
                request.logprobs.append({str(token): entry.logprob for token, entry in position.items()})
        pieces = []
        for number, token_id in enumerate(output.token_ids, start=1):
            request.token_ids.append(token_id)
            if stream:
                # the last token of a step is the target's own choice, those before it were accepted drafts
                pieces.append((self._new_text(request), number < len(output.token_ids)))
        return pieces

    def _new_text(self, request: Running) -> str:
        text: str = self._tokenizer.decode(request.token_ids, skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            # the rest of this character comes with the next token
            return ""
        new = text[len(request.shown) :]
        request.shown = text
        return new

    def _finish(self, index: int, request: Running) -> None:
        answer = {
            "text": request.text,
            "token_ids": request.token_ids,
            "num_steps": max(0, request.num_emissions - 1),
            "seconds": time.perf_counter() - request.started,
            "logprobs": request.logprobs,
        }
        self._send({"event": "answer", "index": index, "answer": answer})

    def _stats(self) -> dict[str, float]:
        """Return the counters of the first worker, which are those of all: they walk the same trees."""
        if not self._has_drafter:
            return {}
        counters = self._llm.collective_rpc("redrafter_stats")[0]
        return {name: value for name, value in counters.items() if isinstance(value, int | float)}

    def _send(self, event: dict[str, Any]) -> None:
        self._events.write(json.dumps(event) + "\n")
        self._events.flush()


if __name__ == "__main__":
    main()
