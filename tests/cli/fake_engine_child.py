"""Stands in for `vllm_redrafter.cli.engine_child`: the same protocol, without vLLM.

`fake.json` in the target's directory says what it does. The answer to a prompt are the words of the prompt, repeated
until there are `max_tokens`, each a token; with a drafter a step emits two of them. Of a prompt of tokens the words
are their numbers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    events = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    os.set_inheritable(events.fileno(), False)

    def send(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    spec = json.loads(sys.stdin.readline())
    behaviour = json.loads((Path(spec["target"]) / "fake.json").read_text())
    behaviour |= behaviour.get("with_drafter", {}) if spec["speculative_config"] else {}
    if "pid_file" in behaviour:
        Path(behaviour["pid_file"]).write_text(str(os.getpid()))
    if "log" in behaviour:
        sys.exit(behaviour["log"])
    send({"event": "ready"})
    words: list[str] = []
    for line in sys.stdin:
        command = json.loads(line)
        if command["command"] == "decode":
            send({"event": "decoded", "texts": [" ".join(words[i] for i in ids) for ids in command["sequences"]]})
            continue
        for index, prompt in enumerate(command["prompts"]):
            answer = answer_to(prompt, command["sampling"], spec, behaviour, words)
            if command["stream"]:
                send(
                    {
                        "event": "pieces",
                        "pieces": [[f"{word} ", bool(n % 2)] for n, word in enumerate(answer["text"].split())],
                    }
                )
            send({"event": "answer", "index": index, "answer": answer})
            if "dies_after" in behaviour and index + 1 >= behaviour["dies_after"]:
                sys.exit("RuntimeError: out of paper")
            if behaviour.get("hangs"):
                time.sleep(60)
        stats = behaviour.get("stats", {}) if spec["speculative_config"] else {}
        seconds = 0.5 if spec["speculative_config"] else 1.0
        if "seconds_per_token" in behaviour:
            seconds = behaviour["seconds_per_token"] * command["sampling"]["max_tokens"]
        send({"event": "done", "seconds": seconds, "stats": stats})


def answer_to(
    prompt: dict[str, Any], sampling: dict[str, Any], spec: dict[str, Any], behaviour: dict[str, Any], words: list[str]
) -> dict[str, Any]:
    if "token_ids" in prompt:
        text = " ".join(map(str, prompt["token_ids"]))
    else:
        text = prompt["text"] if "text" in prompt else " / ".join(message["content"] for message in prompt["messages"])
    if len(text.split()) > behaviour.get("max_words", 1000):
        return {"text": "", "token_ids": [], "num_steps": 0, "seconds": 0.0, "error": "too long"}
    if "echoes" in behaviour:
        text = str(prompt[behaviour["echoes"]])
    said = (text.split() * sampling["max_tokens"])[: sampling["max_tokens"]]
    if sampling["temperature"] == behaviour.get("differs_at_temperature"):
        said[behaviour["differs_at"]] = "WRONG"
    for word in said:
        if word not in words:
            words.append(word)
    answer = {
        "text": " ".join(said),
        "token_ids": [int(word) if "token_ids" in prompt else words.index(word) for word in said],
        "num_steps": (len(said) - 1) // (2 if spec["speculative_config"] else 1),
        "seconds": 0.25,
    }
    if "logprobs" in sampling:
        answer["logprobs"] = [{str(token): -1.0 + behaviour.get("logprob_shift", 0.0)} for token in answer["token_ids"]]
    return answer


if __name__ == "__main__":
    main()
