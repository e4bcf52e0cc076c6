"""What drafting has done so far, under the names that mlx-swift-lm gives its counters."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Telemetry:
    """Counters of one or more texts; a round is a verification of drafts."""

    round_count: int = 0
    draft_token_count: int = 0
    """Drafted tokens that were verified: the trees' nodes, roots not counted."""
    accepted_draft_token_count: int = 0
    target_model_call_count: int = 0
    """Forwards of the target behind the prompt's."""
    draft_model_call_count: int = 0
    """Beam searches."""
    target_verified_token_count: int = 0
    """Tokens that those forwards read: the trees' nodes, roots included."""
    emitted_token_count: int = 0
    accepted_lengths: list[int] = field(default_factory=list)
    """Drafts accepted by each round."""

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.accepted_draft_token_count / max(1, self.draft_token_count)

    @property
    def mean_accepted_draft_tokens_per_round(self) -> float:
        """Drafts accepted by a verification."""
        return self.accepted_draft_token_count / max(1, self.round_count)

    @property
    def mean_emitted_tokens_per_target_call(self) -> float:
        """Tokens that a forward of the target yields."""
        return self.emitted_token_count / max(1, self.target_model_call_count)

    def to_dict(self) -> dict[str, float]:
        """Return counters and ratios as mlx-swift-lm spells them."""
        return {
            "roundCount": self.round_count,
            "draftTokenCount": self.draft_token_count,
            "acceptedDraftTokenCount": self.accepted_draft_token_count,
            "targetModelCallCount": self.target_model_call_count,
            "draftModelCallCount": self.draft_model_call_count,
            "targetVerifiedTokenCount": self.target_verified_token_count,
            "emittedTokenCount": self.emitted_token_count,
            "acceptanceRate": self.acceptance_rate,
            "meanAcceptedDraftTokensPerRound": self.mean_accepted_draft_tokens_per_round,
            "meanEmittedTokensPerTargetCall": self.mean_emitted_tokens_per_target_call,
        }
