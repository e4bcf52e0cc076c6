"""Acceptance inside vLLM: the walk of `core.acceptance`, with every token drawn by the target's own sampler.

The sampler is called once per depth on one row per request, as if that depth were a decoding step of its own: the
tokens accepted so far stand in the request's output, a seeded generator is drawn from once per emitted token, and
every sampling option means what it means without speculation.

Trees and walks are plain lists here: on a CPU that has just read a model's weights, a few dozen tensor operations cost
more than the lists of a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_redrafter.adapter.tree_batch import DraftTree, TreeBatch


class Walk(NamedTuple):
    """What a verification yields, by request: the accepted drafts and one token more."""

    tokens: list[list[int]]
    nodes: list[list[int]]
    """The root and the accepted nodes: every token was drawn at the node in its place."""


Draw = Callable[[list[int]], list[int]]
"""Draws one token of the target per request, given the node at which each stands; called once per depth."""


def walk(trees: Sequence[DraftTree], draw: Draw) -> Walk:
    """Return the tokens that the target emits for every request."""
    children = [tree.children() for tree in trees]
    at = [0] * len(trees)
    walked = Walk([[] for _ in trees], [[] for _ in trees])
    walking = list(range(len(trees)))
    while walking:
        drawn = draw(at)
        going_on = []
        for request in walking:
            walked.tokens[request].append(drawn[request])
            walked.nodes[request].append(at[request])
            child = children[request].get((at[request], drawn[request]))
            if child is not None:
                at[request] = child
                going_on.append(request)
        walking = going_on
    return walked


class Verifier:
    """Draws from vLLM's sampler along the trees of one step."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def verify(
        self,
        batch: TreeBatch,
        logits: torch.Tensor,  # [sum of (1 + nodes), vocab_size]
        metadata: SamplingMetadata,
        outputs: Sequence[list[int]],
        discarded: frozenset[int],
    ) -> tuple[SamplerOutput, Walk]:
        """Return the tokens of every request, and the nodes that they were drawn at.

        Args:
            outputs: the tokens emitted so far, by request: the very lists that penalties and `min_tokens` look at.
            discarded: requests in the middle of their prompt: vLLM drops what is drawn for them, so nothing may be
                drawn from their generators.
        """
        _draw_by_steps(metadata)
        if not batch.num_nodes:
            if discarded:
                metadata = _drawing_for(set(range(len(logits))) - discarded, metadata)
            output = self.sampler(logits, metadata)
            return output, Walk(output.sampled_token_ids.tolist(), [[0]] * len(logits))
        if is_plain_greedy(metadata):
            choices = self.sampler.greedy_sample(logits.float()).tolist()
            walked = walk(
                batch.trees, lambda at: [choices[row + node] for row, node in zip(batch.logit_rows, at, strict=True)]
            )
            return SamplerOutput(_padded(walked.tokens), None), walked
        draw = _SamplerDraw(self.sampler, logits, batch.logit_rows, metadata, outputs, discarded)
        lengths = [len(output) for output in outputs]
        walked = walk(batch.trees, draw)
        # vLLM appends the accepted tokens itself
        for output, length in zip(outputs, lengths, strict=True):
            del output[length:]
        return SamplerOutput(_padded(walked.tokens), draw.logprobs()), walked


class _SamplerDraw:
    """One draw per request and depth; the requests whose walk has ended are drawn for too, and ignored."""

    def __init__(
        self,
        sampler: Any,
        logits: torch.Tensor,
        first_rows: Sequence[int],
        metadata: SamplingMetadata,
        outputs: Sequence[list[int]],
        discarded: frozenset[int],
    ) -> None:
        self.sampler = sampler
        self.logits = logits
        self.first_rows = first_rows
        self.metadata = metadata
        self.outputs = outputs
        self.alive = set(range(len(first_rows))) - discarded
        self.last_nodes: list[int] | None = None
        self.last_tokens: list[int] = []
        self.columns: list[LogprobsTensors] = []

    def __call__(self, nodes: list[int]) -> list[int]:
        """Return one token per request, drawn from the target's distribution at `nodes`."""
        if self.last_nodes is not None:
            self._append_accepted(nodes)
        metadata = replace(_drawing_for(self.alive, self.metadata), spec_token_ids=[[] for _ in nodes])
        rows = torch.tensor([row + node for row, node in zip(self.first_rows, nodes, strict=True)])
        # the sampler works in place on fp32 logits: it gets rows of its own
        output = self.sampler(self.logits[rows], metadata)
        if output.logprobs_tensors is not None:
            self.columns.append(output.logprobs_tensors)
        self.last_nodes, self.last_tokens = list(nodes), output.sampled_token_ids[:, 0].tolist()
        return self.last_tokens

    def logprobs(self) -> LogprobsTensors | None:
        """Return what the sampler reported, one row per request and depth, the depths of a request together."""
        if not self.columns:
            return None
        return LogprobsTensors(
            *(
                torch.stack([column[index] for column in self.columns], dim=1).flatten(0, 1)
                for index in range(3)  # token ids, log-probabilities, ranks
            )
        )

    def _append_accepted(self, nodes: list[int]) -> None:
        """Let penalties and the like see the tokens that were accepted since the last draw."""
        assert self.last_nodes is not None
        moved = {index for index in self.alive if nodes[index] != self.last_nodes[index]}
        self.alive = moved
        for index in moved:
            self.outputs[index].append(self.last_tokens[index])
        for processor in self.metadata.logitsprocs.all:
            processor.update_state(None)


def _padded(tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return vLLM's form of what was emitted, [batch, most tokens] int32, with -1 behind the last token."""
    width = max(len(row) for row in tokens)
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in tokens], dtype=torch.int32)


def _draw_by_steps(metadata: SamplingMetadata) -> None:
    """Tell what forces the end of thinking that every draw is a step with one row per request.

    It looks for the rows of vLLM's own speculation otherwise.
    """
    if metadata.thinking_budget_state_holder is not None:
        metadata.thinking_budget_state_holder.in_spec_mode = False


def _drawing_for(requests: Set[int], metadata: SamplingMetadata) -> SamplingMetadata:
    """Return metadata with which the seeded generators of `requests` alone are drawn from."""
    kept = {index: generator for index, generator in metadata.generators.items() if index in requests}
    return replace(metadata, generators=kept)


def is_plain_greedy(metadata: SamplingMetadata) -> bool:
    """Return whether a token is the argmax of raw logits for every request, and nothing else is asked for."""
    return (
        metadata.all_greedy
        and metadata.no_penalties
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and metadata.thinking_budget_state_holder is None
        and not any(_is_active(processor) for processor in metadata.logitsprocs.non_argmax_invariant)
    )


def _is_active(processor: Any) -> bool:
    """Return whether a built-in logits processor has a request to work on; an unknown one always counts."""
    for attribute in ("min_toks", "biases"):
        if hasattr(processor, attribute):
            return bool(getattr(processor, attribute))
    return True
