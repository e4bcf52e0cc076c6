from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest

from tests.training.tokenizers import example_tokenizer
from vllm_redrafter.cli.engine_child import Server


def test_a_conversation_that_the_chat_template_refuses_gets_the_reason_for_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = example_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=64))
    llm = SimpleNamespace(get_tokenizer=lambda: tokenizer, llm_engine=llm_engine)
    monkeypatch.setattr("vllm.LLM", lambda target, **spec: llm)
    events = io.StringIO()
    server = Server({"target": "t", "speculative_config": None}, events)

    server.generate([{"messages": [{"role": "system", "content": "be brief"}]}], {}, stream=False)

    _, answer, done = map(json.loads, events.getvalue().splitlines())
    assert answer["answer"]["error"] == "the chat template refuses it (no system here)"
    assert done["event"] == "done"
