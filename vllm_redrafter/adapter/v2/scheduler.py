"""vLLM's scheduler with a table of sizes that learns: what `scheduler_cls` names where the budget is automatic."""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_redrafter.adapter.patches import is_redrafter
from vllm_redrafter.adapter.v2.sizes import TreeSizes


def make(vllm_config: Any, **kwargs: Any) -> Scheduler:
    """Return the scheduler of an engine: vLLM calls this as it would call a class.

    Where arguments that made an engine with a drafter make another one without, that is vLLM's own.
    """
    is_async = vllm_config.scheduler_config.async_scheduling
    if is_redrafter(vllm_config.speculative_config):
        return (AsyncTreeScheduler if is_async else TreeScheduler)(vllm_config=vllm_config, **kwargs)
    return (AsyncScheduler if is_async else Scheduler)(vllm_config=vllm_config, **kwargs)


class _LearnsSizes:
    """What both schedulers have on top of vLLM's.

    The seconds between the outputs of two steps are what the second one took, its drafts included: they were made after
    the tokens before them had been drawn.
    """

    dynamic_sd_lookup: Any
    """vLLM's table of sizes by batch size; None where it has put it out of use, as with data parallelism."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.dynamic_sd_lookup is not None:
            self.dynamic_sd_lookup = TreeSizes(self.dynamic_sd_lookup[1:])
        self._last_output = time.perf_counter()

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Learn from a step, then do what vLLM does."""
        now = time.perf_counter()
        if self.dynamic_sd_lookup is not None and scheduler_output.num_scheduled_tokens:
            learn(self.dynamic_sd_lookup, scheduler_output, model_runner_output, now - self._last_output)
        self._last_output = now
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]


class TreeScheduler(_LearnsSizes, Scheduler):
    """For engines that wait for every step."""


class AsyncTreeScheduler(_LearnsSizes, AsyncScheduler):
    """For engines that schedule a step while another one runs."""


def learn(sizes: TreeSizes, scheduler_output: Any, model_runner_output: Any, seconds: float) -> None:
    """Tell `sizes` what a step has verified and what was accepted of it; of a step without prompts, what it took.

    Args:
        sizes: of the engine.
        scheduler_output: what was scheduled.
        model_runner_output: what came of it.
        seconds: since the output of the step before.
    """
    num_scheduled, drafts = scheduler_output.num_scheduled_tokens, scheduler_output.scheduled_spec_decode_tokens
    size = max(map(len, drafts.values()), default=0)
    sampled, index = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
    # a request for which nothing was drawn has not been verified
    answers = [sampled[index[request]] for request, tokens in drafts.items() if len(tokens) == size]
    accepted = [len(answer) - 1 for answer in answers if answer]
    sizes.observe_trees(size, len(accepted), sum(accepted))
    # a new request may need one token only, where its prefix is cached, and may have come after a time without any
    is_decoding = not scheduler_output.scheduled_new_reqs and all(count == 1 + size for count in num_scheduled.values())
    if is_decoding:
        sizes.observe_step(len(num_scheduled), size, seconds)
