from __future__ import annotations

from mlx_port.telemetry import Telemetry


def test_counters_and_ratios_have_the_names_of_mlx_swift_lm() -> None:
    telemetry = Telemetry(
        round_count=4,
        draft_token_count=20,
        accepted_draft_token_count=5,
        target_model_call_count=6,
        draft_model_call_count=7,
        target_verified_token_count=26,
        emitted_token_count=9,
        accepted_lengths=[2, 0, 3, 0],
    )

    assert telemetry.to_dict() == {
        "roundCount": 4,
        "draftTokenCount": 20,
        "acceptedDraftTokenCount": 5,
        "targetModelCallCount": 6,
        "draftModelCallCount": 7,
        "targetVerifiedTokenCount": 26,
        "emittedTokenCount": 9,
        "acceptanceRate": 0.25,
        "meanAcceptedDraftTokensPerRound": 1.25,
        "meanEmittedTokensPerTargetCall": 1.5,
    }


def test_ratios_of_nothing_are_zero() -> None:
    assert not any(Telemetry().to_dict().values())
