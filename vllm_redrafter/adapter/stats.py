"""What speculation did, counted where it happens: `LLM.collective_rpc("redrafter_stats")` reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Stats:
    """Counters since the worker started; vLLM's own count a tree's nodes as if they were a chain's positions."""

    num_steps: int = 0
    """Steps of decoding, summed over requests; the one that ends a prompt is not counted."""
    num_emitted_tokens: int = 0
    """Tokens emitted by those; over `num_steps` this is the mean acceptance length."""
    num_drafts: int = 0
    """Verifications that had drafts."""
    num_draft_tokens: int = 0
    """Nodes verified."""
    num_accepted_tokens: int = 0
    """Nodes accepted."""
    accepted_by_depth: list[int] = field(default_factory=list)
    """Accepted nodes at depth 1, 2, ..."""
    num_branching_trees: int = 0
    """Verified trees that were not chains."""
    num_branch_acceptances: int = 0
    """Accepted paths that left the tree's first path."""
    num_commits: int = 0
    """Steps in which keys and values of accepted nodes had to be written to their slots."""
    num_truncated_trees: int = 0
    """Trees that the scheduler cut."""
    num_chain_fallbacks: int = 0
    """Drafts verified as a chain because they were not the ones proposed."""
    num_linear_drafts: int = 0
    """Drafts proposed as chains because the request's semantics are linear (structured outputs)."""
    num_skipped_drafts: int = 0
    """Steps after which nothing was drafted because it would not have paid."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    """Time of the acceptance walk and the commit."""
    adapter_seconds: float = 0.0
    """Time of tree bookkeeping: batch assembly, attention rounds, budget, lists for the scheduler."""
    num_engine_steps: int = 0

    def count_skipped(self, num_requests: int) -> None:
        """Count a step of so many requests that had nothing to verify and after which nothing was drafted."""
        self.num_engine_steps += 1
        self.num_skipped_drafts += 1
        self.count_plain(num_requests)

    def count_plain(self, num_requests: int) -> None:
        """Count a step of so many requests, each of which had nothing to verify and emitted one token."""
        self.num_steps += num_requests
        self.num_emitted_tokens += num_requests

    def count_accepted(self, num_nodes: int, depth: int, num_emitted: int, on_first_path: bool) -> None:
        """Count one request's verification of `num_nodes` drafts, of which a path of `depth` was accepted."""
        self.num_steps += 1
        self.num_emitted_tokens += num_emitted
        if num_nodes == 0:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_nodes
        self.num_accepted_tokens += depth
        self.num_branch_acceptances += not on_first_path
        self.accepted_by_depth += [0] * (depth - len(self.accepted_by_depth))
        for level in range(depth):
            self.accepted_by_depth[level] += 1

    def as_dict(self) -> dict[str, Any]:
        """Return the counters as plain numbers and lists."""
        return asdict(self)
