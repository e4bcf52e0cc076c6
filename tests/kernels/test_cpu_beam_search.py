"""The search in one call finds what the search operation by operation does, with weights of as many bits."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from vllm_redrafter.core import beam_search
from vllm_redrafter.core.beam_search import BeamShape, Candidates, Foresight
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.core.noise import Truncation, gumbel
from vllm_redrafter.kernels.cpu_beam_search import CpuBeamSearch, Draws, PackedDrafter

HIDDEN, VOCAB, LENGTH, SHARPNESS = 24, 300, 5, 1.25

DRAFTERS: dict[str, dict[str, Any]] = {
    "[h; s] as it is": {},
    "a projection": {"exit_dim": 40},
    "no blocks": {"exit_dim": 40, "num_draft_layers": 0},
    "three blocks": {"num_draft_layers": 3},
    "no rnn": {"rnn": False},
    "a tied head": {"exit_dim": HIDDEN, "tie_lm_head": True},
    "a draft vocabulary": {"draft_vocab_size": 77},
    "a head smaller than a panel": {"draft_vocab_size": 5},
    "fused layers": {"fused_layers": [0, 2], "exit_dim": 40},
}


class Pair:
    """A search and its twin."""

    def __init__(self, *, is_folded: bool = True, table: torch.dtype = torch.float32, **changes: Any) -> None:
        torch.manual_seed(0)
        drafter = ReDrafter(ReDrafterConfig(HIDDEN, VOCAB, **changes)).requires_grad_(False).eval()
        if drafter.config.draft_vocab_size:
            drafter.set_draft_vocabulary(torch.arange(drafter.config.head_size) * 3 + 1)
        if drafter.config.tie_lm_head:
            drafter.tie_head(torch.randn(VOCAB, HIDDEN))
        for parameter in drafter.parameters():
            parameter *= 2  # surer, so that beams differ
        embeddings = torch.randn(VOCAB, HIDDEN)
        if is_folded and drafter.config.rnn:
            embeddings = drafter.fold_embeddings(embeddings)
        embeddings = embeddings.to(table)
        self.packed = PackedDrafter(drafter, embeddings)
        self.drafter = rounded(drafter)
        self.embed = nn.Embedding.from_pretrained(embeddings.float())

    def search(self, shape: BeamShape, num_candidates: int, inputs: tuple[torch.Tensor, ...], *how: Any) -> Candidates:
        return CpuBeamSearch(self.packed, shape, num_candidates, SHARPNESS).run(*inputs, *how)

    def twin(
        self,
        shape: BeamShape,
        num_candidates: int,
        inputs: tuple[torch.Tensor, ...],
        floor: float = -math.inf,
        draws: Draws | None = None,
    ) -> Candidates:
        foresight = None if draws is None else foreseen(draws, self.drafter.drafted_ids(torch.device("cpu")))
        how = num_candidates, floor, SHARPNESS, foresight
        return beam_search.search(self.drafter, self.embed, *inputs, shape, *how)

    def inputs(self, num_requests: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(num_requests)
        hidden = torch.randn(num_requests, self.drafter.config.input_size, generator=generator)
        return hidden, torch.randint(VOCAB, (num_requests,), generator=generator)


def rounded(drafter: ReDrafter) -> ReDrafter:
    """Return a copy whose matrices hold what bf16 can, but for what torch multiplies."""
    drafter = copy.deepcopy(drafter)
    for name, module in drafter.named_modules():
        if isinstance(module, nn.Linear) and name != "fc":
            module.weight.copy_(module.weight.bfloat16())
    if drafter._tied_head is not None:
        drafter._tied_head = drafter._tied_head.bfloat16().float()
    return drafter


def foreseen(draws: Draws, token_ids: torch.Tensor) -> Foresight:
    """Return the draws for the twin: greedy requests have noise of 0 and leave nothing out."""
    seeds, truncation = draws
    temperatures = truncation.temperatures
    neutral = truncation._replace(temperatures=temperatures.where(temperatures > 0, 1.0))

    def change(depth: int, logits: torch.Tensor) -> torch.Tensor:
        noise = gumbel(seeds[:, depth], token_ids) * temperatures[:, None]
        return neutral.lift(logits, noise[:, None])

    return change


def draws_of(num_requests: int, temperatures: list[float], **options: float) -> Draws:
    """Return draws of requests whose temperatures take turns; the greedy ones leave nothing out."""
    generator = torch.Generator().manual_seed(7)
    seeds = torch.randint(1 << 31, (num_requests, LENGTH), generator=generator)
    temperature = torch.tensor([temperatures[row % len(temperatures)] for row in range(num_requests)])
    is_drawn = temperature > 0
    columns = {"top_k": 0.0, "top_p": 1.0, "min_p": 0.0} | options
    top_k, top_p, min_p = (
        torch.where(is_drawn, columns[name], neutral)
        for name, neutral in (("top_k", 0.0), ("top_p", 1.0), ("min_p", 0.0))
    )
    return Draws(seeds, Truncation(temperature, top_k.long(), top_p, min_p, bool(options)))


def assert_same(found: Candidates, expected: Candidates) -> None:
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.parents, expected.parents)


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize(("width", "num_requests"), [(1, 1), (4, 1), (1, 3), (3, 5), (4, 17)])
def test_greedy_requests(name: str, width: int, num_requests: int) -> None:
    pair = Pair(**DRAFTERS[name])
    arguments = BeamShape(width, LENGTH), 8, pair.inputs(num_requests)

    assert_same(pair.search(*arguments), pair.twin(*arguments))


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rnn", [True, False])
def test_a_table_of_embeddings_themselves_is_multiplied_where_there_is_an_rnn(rnn: bool, table: torch.dtype) -> None:
    pair = Pair(is_folded=False, table=table, rnn=rnn)
    arguments = BeamShape(3, LENGTH), 8, pair.inputs(2)

    assert_same(pair.search(*arguments), pair.twin(*arguments))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_p": 0.6},
        {"top_k": 1},
        {"top_k": 20},
        {"min_p": 0.1},
        {"top_p": 0.9, "top_k": 9, "min_p": 0.02},
        {"top_p": 0.999999},  # of more tokens than are ranked; near 0.9999 last digits decide about the last one
    ],
    ids=str,
)
@pytest.mark.parametrize("temperatures", [[1.0], [0.6], [0.0, 1.3]], ids=str)
@pytest.mark.parametrize(("width", "num_requests"), [(1, 1), (4, 3)])
def test_sampled_requests_whose_noise_is_known(
    width: int, num_requests: int, temperatures: list[float], options: dict[str, float]
) -> None:
    pair = Pair(exit_dim=40)
    arguments = BeamShape(width, LENGTH), 8, pair.inputs(num_requests)
    draws = draws_of(num_requests, temperatures, **options)

    found = pair.search(*arguments, -math.inf, draws)

    assert_same(found, pair.twin(*arguments, -math.inf, draws))
    if temperatures[0] > 0 and options.get("top_k") != 1:
        assert not torch.equal(found.token_ids, pair.search(*arguments).token_ids)


def test_a_flat_distribution_may_keep_more_tokens_than_are_ranked() -> None:
    pair = Pair()
    for linear in (*pair.packed.drafter.modules(), *pair.drafter.modules()):
        if isinstance(linear, nn.Linear):
            linear.weight *= 0.01
    pair.packed = PackedDrafter(pair.packed.drafter, pair.packed.table)
    pair.drafter = rounded(pair.drafter)
    arguments = BeamShape(1, LENGTH), 8, pair.inputs(2)

    for top_p in (0.8, 0.99):  # 256 of 300 tokens are ranked
        draws = draws_of(2, [1.0], top_p=top_p)
        found, expected = pair.search(*arguments, -math.inf, draws), pair.twin(*arguments, -math.inf, draws)
        # which of two equals comes first is open
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)


def test_noise_is_exact_where_it_is_large() -> None:
    pair = Pair(draft_vocab_size=None)
    arguments = BeamShape(1, LENGTH), 8, pair.inputs(40)
    for linear in pair.packed.drafter.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.zero_()
    pair.packed = PackedDrafter(pair.packed.drafter, pair.packed.table)
    draws = draws_of(40, [1.0])

    found = pair.search(*arguments, -math.inf, draws)

    noise = SHARPNESS * gumbel(draws.seeds[:, 0], torch.arange(VOCAB)).double()
    best = noise.log_softmax(dim=-1).topk(8)
    assert noise.max() > SHARPNESS * 8
    torch.testing.assert_close(found.log_probs[:, :8].double(), best.values, rtol=0, atol=1e-5)
    assert torch.equal(found.token_ids[:, :8], best.indices)


@pytest.mark.parametrize("num_depths", [1, 3, LENGTH])
def test_it_ends_at_the_depth_where_no_beam_is_above_the_floor(num_depths: int) -> None:
    pair = Pair()
    arguments = BeamShape(3, LENGTH), 8, pair.inputs(4)
    whole = pair.twin(*arguments)
    floor = float(whole.log_probs[:, 8 * num_depths - 8].max()) + 1e-3  # best of that depth

    found = pair.search(*arguments, floor)

    assert_same(found, pair.twin(*arguments, floor))
    assert found.token_ids.shape == (4, 8 * num_depths)


def test_a_requests_candidates_do_not_depend_on_the_other_requests() -> None:
    pair = Pair()
    hidden, init_ids = pair.inputs(19)
    shape = BeamShape(3, LENGTH)
    together = pair.search(shape, 8, (hidden, init_ids))

    for row in (0, 7, 18):
        alone = pair.search(shape, 8, (hidden[row : row + 1], init_ids[row : row + 1]))
        assert all(torch.equal(mine[0], all_of_them[row]) for mine, all_of_them in zip(alone, together, strict=True))


def test_a_drafter_in_bf16_searches_with_its_own_weights() -> None:
    pair = Pair(exit_dim=40)
    packed = PackedDrafter(copy.deepcopy(pair.packed.drafter).bfloat16(), pair.packed.table)
    inputs = pair.inputs(2)

    found = CpuBeamSearch(packed, BeamShape(3, LENGTH), 8, SHARPNESS).run(*inputs)

    expected = pair.search(BeamShape(3, LENGTH), 8, inputs)
    # the part of x that is projected once is in bf16
    torch.testing.assert_close(found.log_probs[:, 0], expected.log_probs[:, 0], rtol=0.05, atol=0.05)


def test_what_it_does_not_compute_is_refused() -> None:
    drafter = ReDrafter(ReDrafterConfig(HIDDEN, VOCAB, top_k=5))
    table = torch.zeros(VOCAB, HIDDEN)
    with pytest.raises(ValueError, match="top_k of the drafter is 5: the kernel searches among all tokens"):
        PackedDrafter(drafter, table)
    drafter = ReDrafter(ReDrafterConfig(HIDDEN, VOCAB))
    for other in (table.half(), table.t().contiguous().t()):
        with pytest.raises(ValueError, match="pass fp32 or bf16, contiguous"):
            PackedDrafter(drafter, other)
    with pytest.raises(ValueError, match="width and length must be at least 1"):
        CpuBeamSearch(PackedDrafter(drafter, table), BeamShape(0, 3), 8, 1.0)
