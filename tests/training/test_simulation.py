"""Read off a text of the target, the steps are those that decoding takes when it writes that text."""

from __future__ import annotations

import pytest
import torch

from tests.training.small import VOCAB, make_documents, make_drafter, make_target
from vllm_redrafter.core.beam_search import BeamShape
from vllm_redrafter.core.decoding import Generation, generate
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.core.noise import NoisySampler
from vllm_redrafter.training.simulation import Steps, Writing, mean_acceptance_length, simulate
from vllm_redrafter.training.target import FrozenTarget

NUM_TOKENS = 24
PROMPT = torch.tensor([7, 3, 9, 1, 30])
TEMPERATURE = 0.8


def taught(target: FrozenTarget, **fields: object) -> ReDrafter:
    """Return a drafter whose head is the target's: wrong often, but not always."""
    drafter = make_drafter(exit_dim=16, num_draft_layers=0, **fields)
    with torch.no_grad():
        rows = target.head_weight if drafter.target_ids() is None else target.head_weight[drafter.target_ids()]
        drafter.lm_head[-1].weight.copy_(rows)
        if drafter.config.fused_layers:
            drafter.fc.weight.mul_(0.1)
        drafter.input_proj.weight.copy_(torch.cat((torch.eye(16), 0.3 * torch.eye(16)), dim=1))
    return drafter.requires_grad_(False).eval()


def written(target: FrozenTarget, drafter: ReDrafter, generation: Generation) -> Writing:
    token_ids = torch.cat((PROMPT, torch.tensor(generation.token_ids)))
    return Writing(token_ids, target.hidden(token_ids, drafter.config.fused_layers), len(PROMPT), "test")


@pytest.mark.parametrize(
    "fields", [{}, {"draft_vocab_size": VOCAB // 2}, {"top_k": 3}, {"rnn": False}, {"fused_layers": [0, 1]}]
)
@pytest.mark.parametrize(("shape", "num_nodes"), [((1, 4), 4), ((1, 4), 2), ((3, 4), 6), ((4, 5), 16), ((2, 3), 63)])
@pytest.mark.parametrize("sampling", ["greedy", "sampled", "sampled with known noise"])
def test_simulated_steps_are_those_of_decoding(
    fields: dict[str, object], shape: tuple[int, int], num_nodes: int, sampling: str
) -> None:
    target = make_target()
    drafter = taught(target, **fields)
    generator = torch.Generator().manual_seed(4)

    def sampled(logits: torch.Tensor) -> torch.Tensor:
        return torch.multinomial((logits / TEMPERATURE).softmax(dim=-1), 1, generator=generator)[:, 0]

    beams, temperature = BeamShape(*shape), 0.0 if sampling == "greedy" else TEMPERATURE
    seed = 6 if sampling == "sampled with known noise" else None
    sample = {"greedy": None, "sampled": sampled}.get(sampling, NoisySampler(TEMPERATURE, 6))
    generation = generate(target.model, drafter, PROMPT, NUM_TOKENS, shape=beams, num_nodes=num_nodes, sample=sample)

    writing = written(target, drafter, generation)._replace(seed=seed)
    ((steps,),) = simulate(drafter, target.embed, [writing], beams, [num_nodes], temperature=temperature)

    # the text ends within the last step, which may have accepted more than was kept
    assert steps.num_accepted[:-1] == generation.num_accepted[: len(steps.num_accepted) - 1]
    assert len(generation.num_accepted) - len(steps.num_accepted) in (0, 1)
    # the last one's bonus token may lie behind the end
    assert sum(steps.num_accepted) + len(steps.num_accepted) + 1 - NUM_TOKENS in (0, 1)


def test_the_comparison_is_not_of_nothing() -> None:
    target = make_target()

    generation = generate(target.model, taught(target), PROMPT, NUM_TOKENS, shape=BeamShape(4, 5), num_nodes=16)

    assert sum(generation.num_accepted) > 3
    assert min(generation.num_accepted) == 0


def test_one_search_serves_all_budgets() -> None:
    target = make_target()
    drafter = taught(target)
    document = make_documents(30)[0]
    writing = Writing(document.token_ids, target.hidden(document.token_ids), 4, "test")

    budgets = [1, 3, 8, 32]
    together = simulate(drafter, target.embed, [writing], BeamShape(4, 5), budgets, temperature=0.0)

    assert together == [
        simulate(drafter, target.embed, [writing], BeamShape(4, 5), [each], temperature=0.0)[0] for each in budgets
    ]
    assert together[0] != together[-1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_searched_together_in_batches_of_any_size(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    target = make_target()
    drafter = taught(target)
    writings = [
        Writing(document.token_ids, target.hidden(document.token_ids), 4, "test", seed)
        for document, seed in zip(make_documents(40, 3, 4, 5, 25, 31), (3, 4, 5, 6, 7, None), strict=True)
    ]
    alone = [
        simulate(drafter, target.embed, [each], BeamShape(3, 4), [8], temperature=temperature)[0][0]
        for each in writings
    ]

    for num_roots in (256, 2):
        monkeypatch.setattr("vllm_redrafter.training.simulation._ROOTS_PER_SEARCH", num_roots)
        (together,) = simulate(drafter, target.embed, writings, BeamShape(3, 4), [8], temperature=temperature)
        assert together == alone

    assert [bool(each.num_accepted) for each in alone] == [True, False, False, False, True, True]


def test_the_mean_weighs_steps_and_not_texts() -> None:
    assert mean_acceptance_length([Steps([2, 0]), Steps([4])]) == 3
    assert Steps([2, 0]).mean_acceptance_length == 2
