from __future__ import annotations

import torch

from vllm_redrafter.adapter.v2.walk_counts import WalkCounts


def test_walks_are_counted_by_what_they_verified_and_accepted() -> None:
    counts = WalkCounts(3, torch.device("cpu"))
    parents = torch.tensor(
        [
            [-1, 0, 1, 0],  # branches; a path of one in its place
            [-1, 0, 0, 2],  # branches; the second child and its child
            [-1, 0, 1, 2],  # a chain that the scheduler cut after two nodes; both accepted
            [-1, 0, -1, -1],  # one node and padding; rejected
            [-1, 0, 0, 0],  # scheduled without drafts
        ]
    )
    nodes = torch.tensor([[0, 1, -1, -1], [0, 2, 3, -1], [0, 1, 2, -1], [0, -1, -1, -1], [0, -1, -1, -1]])

    counts.add(nodes, parents.flip(0), torch.tensor([4, 3, 2, 1, 0]), torch.tensor([0, 4, 8, 11, 15, 16]))
    counts.add(nodes[3:], parents, torch.tensor([3, 4]), torch.tensor([0, 4, 5]))

    assert counts.describe() == {
        "num_steps": 5,
        "num_emitted_tokens": 10,
        "num_drafts": 5,
        "num_draft_tokens": 3 + 3 + 2 + 1 + 1,
        "num_branching_trees": 2,
        "num_truncated_trees": 1,
        "num_branch_acceptances": 1,
        "num_commits": 1,
        "num_accepted_tokens": 5,
        "accepted_by_depth": [3, 2],
        "budgets": {},
    }
