"""The child process of `engine_process`: `python -m tests.engine.engine_worker FD`.

Reads questions (an engine and a workload) as JSON lines from standard input, writes answers to the descriptor FD, and
ends with its input. An engine stays until another one is asked for. Where ENGINE_SETUP names a module, its `register`
is called before an engine is made, with and without the plugin.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import time
import traceback
from typing import Any


def main() -> None:
    # vLLM collects nine times per engine, half a second each; what Python does by itself is enough
    gc.collect = lambda generation=2: 0
    answers = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    os.set_inheritable(answers.fileno(), False)
    server = _Server()
    for line in sys.stdin:
        question = json.loads(line)
        try:
            server.prepare(question["keywords"])
            answer = server.run(question["workload"])
        except Exception as error:  # noqa: BLE001 - the test is told, and this process is not asked again
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    server.shut_down()
    # an orderly end would collect garbage for ten seconds
    os._exit(0)


class _Server:
    def __init__(self) -> None:
        self._keywords: dict[str, Any] | None = None
        self._llm: Any = None
        self._num_requests = 0
        self._loras: dict[str, int] = {}

    def prepare(self, keywords: dict[str, Any]) -> None:
        """Make the engine asked for the current one."""
        if keywords == self._keywords:
            return
        self.shut_down()
        from vllm import LLM

        if "ENGINE_SETUP" in os.environ:
            importlib.import_module(os.environ["ENGINE_SETUP"]).register()
        self._llm = LLM(**keywords)
        self._keywords = keywords

    def shut_down(self) -> None:
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm, self._keywords = None, None
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()

    def run(self, workload: dict[str, Any]) -> dict[str, Any]:
        self._llm.reset_prefix_cache()
        before, metrics_before = self._stats(), self._metrics()
        graphs_before, pieces_before = _num_replays()
        started = time.perf_counter()
        with _mutation(workload["mutation"]):
            answers, num_steps = self._serve(workload["requests"])
        seconds = time.perf_counter() - started
        graphs, pieces = _num_replays()
        metrics = {name: value - metrics_before.get(name, 0) for name, value in self._metrics().items()}
        return {
            "answers": answers,
            "stats": _difference(self._stats(), before),
            "metrics": metrics,
            "num_engine_steps": num_steps,
            "seconds": seconds,
            "has_plugin": "vllm_redrafter" in sys.modules,
            "is_async": self._llm.llm_engine.vllm_config.scheduler_config.async_scheduling,
            "num_head_rows": self._num_head_rows(),
            "num_graph_replays": graphs - graphs_before,
            "num_piece_replays": pieces - pieces_before,
        }

    def _serve(self, requests: list[dict[str, Any]]) -> tuple[list[dict[str, Any] | None], int]:
        engine = self._llm.llm_engine
        answers: list[dict[str, Any] | None] = [None] * len(requests)
        first_id = self._num_requests
        self._num_requests += len(requests)
        num_steps = clock = 0
        waiting = sorted(range(len(requests)), key=lambda index: requests[index]["add_after"])
        aborts: list[tuple[int, str]] = []
        while waiting or engine.has_unfinished_requests():
            if not engine.has_unfinished_requests():
                clock = max(clock, requests[waiting[0]]["add_after"])
            while waiting and requests[waiting[0]]["add_after"] <= clock:
                index = waiting.pop(0)
                self._add(str(first_id + index), requests[index])
                if requests[index]["abort_after"] is not None:
                    aborts.append((clock + requests[index]["abort_after"], str(first_id + index)))
            engine.abort_request([request_id for when, request_id in aborts if when == clock])
            for output in engine.step():
                if output.finished:
                    answers[int(output.request_id) - first_id] = _answer(output)
            num_steps += 1
            clock += 1
        return answers, num_steps

    def _add(self, request_id: str, request: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams

        sampling = dict(request["sampling"])
        if "structured_outputs" in sampling:
            sampling["structured_outputs"] = StructuredOutputsParams(**sampling["structured_outputs"])
        if "repetition_detection" in sampling:
            sampling["repetition_detection"] = RepetitionDetectionParams(**sampling["repetition_detection"])
        if "logit_bias" in sampling:
            sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
        parameters = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        path = request["lora"]
        lora = path and LoRARequest(path, self._loras.setdefault(path, 1 + len(self._loras)), path)
        prompt = request["prompt"]
        self._llm.llm_engine.add_request(
            request_id,
            prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt},
            parameters,
            lora_request=lora,
        )

    def _stats(self) -> dict[str, Any]:
        """Return the counters of the first worker, which are those of all: they walk the same trees."""
        if "speculative_config" not in (self._keywords or {}):
            return {}
        return self._llm.collective_rpc("redrafter_stats")[0]

    def _num_head_rows(self) -> list[int]:
        """Return what `Result.num_head_rows` is."""
        is_v2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
        if "speculative_config" not in (self._keywords or {}) or not is_v2:
            return []
        return self._llm.collective_rpc(lambda worker: len(_head(worker.model_runner.speculator.model)))

    def _metrics(self) -> dict[str, float]:
        return {metric.name: metric.value for metric in self._llm.get_metrics() if hasattr(metric, "value")}


def _num_replays() -> tuple[int, int]:
    """Return how many CUDA graphs this process has replayed, where it records any: whole ones, and pieces."""
    recorded = sys.modules.get("tests.engine.v2.recorded_graphs")
    if recorded is None:
        return 0, 0
    return recorded.RecordedGraph.num_replays, recorded.RecordedGraph.num_replayed_pieces


def _head(drafter: Any) -> Any:
    return drafter._tied_head if drafter.config.tie_lm_head else drafter.lm_head[-1].weight


def _answer(output: Any) -> dict[str, Any]:
    return {
        "outputs": [
            {
                "token_ids": list(sample.token_ids),
                "text": sample.text,
                "logprobs": _log_probs(sample.logprobs),
                "finish_reason": sample.finish_reason,
                "stop_reason": sample.stop_reason,
            }
            for sample in sorted(output.outputs, key=lambda sample: sample.index)
        ],
        "prompt_logprobs": _log_probs(output.prompt_logprobs),
        "num_cached_tokens": output.num_cached_tokens,
    }


def _log_probs(positions: Any) -> list[dict[str, float] | None] | None:
    if positions is None:
        return None
    return [entries and {str(token): entry.logprob for token, entry in entries.items()} for entries in positions]


def _difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return counters less what they were; lists grow from the end, the rest is what it is now."""
    result: dict[str, Any] = {}
    for name, value in after.items():
        if isinstance(value, list):
            old = before[name] + [0] * (len(value) - len(before[name]))
            result[name] = [new - previous for new, previous in zip(value, old, strict=True)]
        elif isinstance(value, int | float):
            result[name] = value - before[name]
        else:
            result[name] = value
    return result


def _mutation(name: str | None) -> contextlib.AbstractContextManager[None]:
    if name is None:
        return contextlib.nullcontext()
    folder, _, function = name.rpartition(".")
    package = f"tests.engine.{folder}" if folder else "tests.engine"
    return getattr(importlib.import_module(f"{package}.mutations"), function)()


if __name__ == "__main__":
    main()
