from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from tests.core import naive
from vllm_redrafter.core.beam_search import BeamShape, search
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter

HIDDEN = 12
VOCAB = 30


def make_drafter(seed: int = 0, **config: object) -> ReDrafter:
    torch.manual_seed(seed)
    drafter = ReDrafter(ReDrafterConfig(**{"hidden_size": HIDDEN, "vocab_size": VOCAB, **config}))
    for parameter in drafter.parameters():
        nn.init.normal_(parameter, std=0.5)
    return drafter.eval()


def drafted_log_probs(
    drafter: ReDrafter, embedding: nn.Embedding, hidden: torch.Tensor, token_ids: list[int]
) -> torch.Tensor:
    """Return log Q after the init token and after each token that follows, [tokens, head_size]."""
    state = drafter.start(hidden)
    out = []
    for token_id in token_ids:
        state = drafter.advance(state, embedding(torch.tensor(token_id)))
        out.append(drafter.processed_logits(state).log_softmax(dim=-1))
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize(
    ("rnn", "exit_dim", "num_draft_layers"), list(product([True, False], [HIDDEN, 2 * HIDDEN, 20], [0, 1, 2]))
)
def test_the_drafter_computes_the_papers_equations(rnn: bool, exit_dim: int, num_draft_layers: int) -> None:
    drafter = make_drafter(rnn=rnn, exit_dim=exit_dim, num_draft_layers=num_draft_layers)
    embedding, hidden = nn.Embedding(VOCAB, HIDDEN), torch.randn(HIDDEN)
    token_ids = [3, 29, 0, 3]

    log_probs = drafted_log_probs(drafter, embedding, hidden, token_ids)

    expected = naive.drafter_log_probs(drafter, embedding.weight, hidden, token_ids[0])
    for i, row in enumerate(log_probs):
        # float32 against float64
        np.testing.assert_allclose(row, expected(tuple(token_ids[1 : i + 1])), rtol=1e-4, atol=1e-4)
        assert row.dtype == torch.float32
        assert row.exp().sum() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("exit_dim", [HIDDEN, 2 * HIDDEN])
def test_fused_layers_join_the_last_hidden_state_each_normalised(exit_dim: int) -> None:
    drafter = make_drafter(exit_dim=exit_dim, fused_layers=[1, 4])
    # outputs of layers differ by orders of magnitude
    hidden = torch.cat((torch.randn(HIDDEN), 0.05 * torch.randn(HIDDEN), 300 * torch.randn(HIDDEN)))
    embedding, token_ids = nn.Embedding(VOCAB, HIDDEN), [3, 29, 0]

    log_probs = drafted_log_probs(drafter, embedding, hidden, token_ids)

    expected = naive.drafter_log_probs(drafter, embedding.weight, hidden, token_ids[0])
    for i, row in enumerate(log_probs):
        # float32 against float64
        np.testing.assert_allclose(row, expected(tuple(token_ids[1 : i + 1])), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_new_drafter_with_fused_layers_is_apples_bit_for_bit() -> None:
    drafters = []
    for fused_layers in (None, [0, 3]):
        torch.manual_seed(0)
        drafters.append(ReDrafter(ReDrafterConfig(HIDDEN, VOCAB, fused_layers=fused_layers)))
    plain, fused = drafters
    embedding, hidden = nn.Embedding(VOCAB, HIDDEN), torch.randn(5, 3 * HIDDEN)

    rows = drafted_log_probs(fused, embedding, hidden, [3, 29])

    assert fused.state_dict().keys() - plain.state_dict().keys() == {"fc.weight"}
    assert fused.fc.weight.shape == (HIDDEN, 2 * HIDDEN)
    assert torch.equal(rows, drafted_log_probs(plain, embedding, hidden[:, :HIDDEN], [3, 29]))


@torch.no_grad()
def test_a_drafter_with_fused_layers_does_not_take_the_last_hidden_state_alone() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        make_drafter(fused_layers=[1]).start(torch.randn(HIDDEN))


@torch.no_grad()
def test_a_bfloat16_drafter_scores_in_float32() -> None:
    drafter = make_drafter().bfloat16()
    embedding, hidden = nn.Embedding(VOCAB, HIDDEN).bfloat16(), torch.randn(1, HIDDEN).bfloat16()

    found = search(drafter, embedding, hidden, torch.tensor([5]), BeamShape(width=1, length=1), num_candidates=VOCAB)

    assert found.log_probs.dtype == torch.float32
    assert found.log_probs.exp().sum() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_a_draft_vocabulary_scores_only_its_own_tokens() -> None:
    drafter = make_drafter(draft_vocab_size=7)
    target_ids = torch.tensor([0, 2, 3, 11, 17, 28, 29])
    drafter.set_draft_vocabulary(target_ids)
    embedding, hidden = nn.Embedding(VOCAB, HIDDEN), torch.randn(HIDDEN)

    row = drafted_log_probs(drafter, embedding, hidden, [5])[0]

    expected = naive.drafter_log_probs(drafter, embedding.weight, hidden, 5)(())
    assert row.shape == (7,)
    np.testing.assert_allclose(row, expected[target_ids], rtol=1e-4, atol=1e-4)
    assert drafter.target_ids().equal(target_ids)
    assert torch.nonzero(drafter.t2d).flatten().equal(target_ids)
    assert drafter.d2t.equal(target_ids - torch.arange(7))


@torch.no_grad()
@pytest.mark.parametrize("draft_ids", [None, [1, 4, 9, 16, 25]])
def test_a_tied_head_scores_with_the_targets_rows(draft_ids: list[int] | None) -> None:
    size = None if draft_ids is None else len(draft_ids)
    drafter = make_drafter(exit_dim=HIDDEN, tie_lm_head=True, draft_vocab_size=size)
    if draft_ids is not None:
        drafter.set_draft_vocabulary(torch.tensor(draft_ids))
    embedding, hidden, head = nn.Embedding(VOCAB, HIDDEN), torch.randn(HIDDEN), torch.randn(VOCAB, HIDDEN)
    drafter.tie_head(head)

    row = drafted_log_probs(drafter, embedding, hidden, [5])[0]

    untied = make_drafter(exit_dim=HIDDEN, draft_vocab_size=size)
    untied.load_state_dict({**drafter.state_dict(), "lm_head.2.weight": head if size is None else head[draft_ids]})
    torch.testing.assert_close(row, drafted_log_probs(untied, embedding, hidden, [5])[0])
    np.testing.assert_allclose(
        row,
        naive.drafter_log_probs(drafter, embedding.weight, hidden, 5)(())[slice(None) if size is None else draft_ids],
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_tied_head_stays_the_targets_own_parameter() -> None:
    drafter = make_drafter(exit_dim=HIDDEN, tie_lm_head=True)
    before = set(drafter.state_dict())

    drafter.tie_head(torch.nn.Parameter(torch.randn(VOCAB, HIDDEN)))

    assert set(drafter.state_dict()) == before
    assert all("tied" not in name for name, _ in drafter.named_parameters())


def test_a_head_tied_to_the_whole_vocabulary_is_not_copied() -> None:
    drafter = make_drafter(exit_dim=HIDDEN, tie_lm_head=True)
    head = torch.randn(VOCAB, HIDDEN)

    drafter.tie_head(head)

    assert drafter._tied_head.data_ptr() == head.data_ptr()
    assert not any("lm_head.2" in name for name in drafter.state_dict())


def test_top_k_keeps_the_best_and_all_that_tie_with_the_last_of_them() -> None:
    """Head rows come in threes that pick one entry of x each, so the 50th best logit is one of three equal ones."""
    hidden_size, vocab_size = 10, 60
    drafter = ReDrafter(
        ReDrafterConfig(hidden_size=hidden_size, vocab_size=vocab_size, num_draft_layers=0, top_k=50, rnn=False)
    )
    head = torch.zeros(vocab_size, 2 * hidden_size)
    head[torch.arange(vocab_size), torch.arange(vocab_size) // 3] = 1
    drafter.lm_head[0].weight.data = head
    embedding, hidden = nn.Embedding(vocab_size, hidden_size), torch.randn(hidden_size)

    row = drafted_log_probs(drafter, embedding, hidden, [4])[0].detach()

    assert int(row.isfinite().sum()) == 51
    x = torch.cat((hidden, embedding.weight[4].detach()))
    assert set(torch.nonzero(row.isfinite()).flatten().tolist()) == {
        3 * int(i) + j for i in x.argsort(descending=True)[:17] for j in range(3)
    }
    assert row.exp().sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(
        row, naive.drafter_log_probs(drafter, embedding.weight, hidden, 4)(()), rtol=1e-5, atol=1e-5
    )


def test_top_k_at_or_above_the_vocabulary_changes_nothing() -> None:
    embedding, hidden = nn.Embedding(VOCAB, HIDDEN), torch.randn(HIDDEN)

    rows = [drafted_log_probs(make_drafter(top_k=top_k), embedding, hidden, [4]) for top_k in (None, VOCAB, VOCAB + 1)]

    assert rows[0].equal(rows[1])
    assert rows[0].equal(rows[2])


@pytest.mark.parametrize(
    ("sizes", "millions"),
    [
        ({"hidden_size": 4096, "vocab_size": 32000, "num_draft_layers": 1}, 362.8),
        ({"hidden_size": 5120, "vocab_size": 32000, "num_draft_layers": 2}, 589.8),
        ({"hidden_size": 4096, "vocab_size": 128256, "num_draft_layers": 2}, 1218),
        ({"hidden_size": 2560, "vocab_size": 151936, "num_draft_layers": 2}, 843),
    ],
)
def test_a_drafter_has_as_many_parameters_as_apples(sizes: dict[str, int], millions: float) -> None:
    with torch.device("meta"):
        drafter = ReDrafter(ReDrafterConfig(**sizes))

    num_parameters = sum(parameter.numel() for parameter in drafter.parameters())

    assert num_parameters / 1e6 == pytest.approx(millions, abs=0.6)


def test_a_drafter_for_vicuna_7b_has_429_936_640_parameters() -> None:
    with torch.device("meta"):
        drafter = ReDrafter(ReDrafterConfig(hidden_size=4096, vocab_size=32000, num_draft_layers=2))

    assert sum(parameter.numel() for parameter in drafter.parameters()) == 429_936_640


@pytest.mark.parametrize(("rnn", "exit_dim", "n"), list(product([True, False], [HIDDEN, 2 * HIDDEN], [0, 2])))
def test_tensors_carry_apples_names_and_shapes(rnn: bool, exit_dim: int, n: int) -> None:
    drafter = make_drafter(rnn=rnn, exit_dim=exit_dim, num_draft_layers=n)

    expected = {f"lm_head.{n}.weight": (VOCAB, exit_dim)}
    for i in range(n):
        expected[f"lm_head.{i}.linear.weight"] = (exit_dim, exit_dim)
        expected[f"lm_head.{i}.linear.bias"] = (exit_dim,)
    if rnn:
        expected["rnn_u.weight"] = expected["rnn_w.weight"] = (HIDDEN, HIDDEN)
        expected["rnn_u.bias"] = (HIDDEN,)
    if exit_dim != 2 * HIDDEN:
        expected["input_proj.weight"] = (exit_dim, 2 * HIDDEN)
        expected["input_proj.bias"] = (exit_dim,)
    assert {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()} == expected


def test_a_draft_vocabulary_is_saved_with_the_drafter() -> None:
    drafter, other = make_drafter(draft_vocab_size=3), make_drafter(draft_vocab_size=3, seed=1)
    drafter.set_draft_vocabulary(torch.tensor([4, 5, 9]))

    other.load_state_dict(drafter.state_dict())

    assert {"d2t", "t2d"} <= set(drafter.state_dict())
    assert other.target_ids().tolist() == [4, 5, 9]


@pytest.mark.parametrize(
    ("target_ids", "message"),
    [
        ([1, 2], "3 ids are needed"),
        ([1, 1, 2], "ascending"),
        ([5, 4, 6], "ascending"),
        ([0, 1, VOCAB], "below vocab_size"),
        ([-1, 1, 2], "ascending and below"),
    ],
)
def test_a_draft_vocabulary_that_does_not_fit_is_refused(target_ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_drafter(draft_vocab_size=3).set_draft_vocabulary(torch.tensor(target_ids))


def test_a_drafter_with_its_own_head_takes_no_other() -> None:
    with pytest.raises(ValueError, match="own head"):
        make_drafter().tie_head(torch.zeros(VOCAB, HIDDEN))


def test_a_tied_drafter_without_the_targets_head_says_what_is_missing() -> None:
    drafter = make_drafter(exit_dim=HIDDEN, tie_lm_head=True)

    with pytest.raises(RuntimeError, match="tie_head"):
        drafter.logits(drafter.start(torch.zeros(HIDDEN)))


@torch.no_grad()
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_part_of_a_head_scores_its_tokens_alike_and_keeps_no_memory_of_the_rest(is_tied: bool) -> None:
    drafter = make_drafter(exit_dim=HIDDEN, tie_lm_head=is_tied, draft_vocab_size=11)
    drafter.set_draft_vocabulary(torch.arange(11) * 2)
    if is_tied:
        drafter.tie_head(torch.randn(VOCAB, HIDDEN))
    state = drafter.advance(drafter.start(torch.randn(HIDDEN)), torch.randn(HIDDEN))
    whole = drafter.logits(state)

    drafter.keep_head_rows(range(4, 7))

    torch.testing.assert_close(drafter.logits(state), whole[4:7])
    head = drafter._tied_head if is_tied else drafter.lm_head[-1].weight
    assert head.untyped_storage().nbytes() == 3 * HIDDEN * head.element_size()


@torch.no_grad()
def test_folded_embeddings_draft_the_same_without_their_matrix() -> None:
    drafter = make_drafter()
    embedding, hidden = nn.Embedding(VOCAB, HIDDEN), torch.randn(HIDDEN)
    expected = drafted_log_probs(drafter, embedding, hidden, [3, 29, 0])

    folded = nn.Embedding.from_pretrained(drafter.fold_embeddings(embedding.weight))

    torch.testing.assert_close(drafted_log_probs(drafter, folded, hidden, [3, 29, 0]), expected)
    assert isinstance(drafter.rnn_w, nn.Identity)


def test_a_drafter_without_an_rnn_has_nothing_to_fold() -> None:
    with pytest.raises(ValueError, match="rnn=false"):
        make_drafter(rnn=False).fold_embeddings(torch.randn(VOCAB, HIDDEN))
