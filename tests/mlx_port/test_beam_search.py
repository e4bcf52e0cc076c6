from __future__ import annotations

from importlib import metadata
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_port import beam_search
from mlx_port.beam_search import BeamShape, Candidates
from tests.mlx_port.tiny_models import make_drafter
from tests.mlx_port.twins import EXAMPLE, HIDDEN, VARIANTS, Twins, load_twins, save_random, to_numpy
from vllm_redrafter.core import beam_search as core

# float32 has 24 bits, and these logits, of a size of up to 100, are sums in another order
TOLERANCE = 2e-3
SHAPES = [(1, 5, None), (2, 3, None), (4, 4, 8), (10, 4, 60), (45, 4, 63)]


def _search_both(
    twins: Twins, hidden: np.ndarray, init_id: int, shape: tuple[int, int], count: int | None
) -> tuple[Candidates, core.Candidates]:
    ours = beam_search.search(twins.mlx, twins.mlx_embed, mx.array(hidden), mx.array(init_id), BeamShape(*shape), count)
    theirs = core.search(
        twins.torch,
        twins.torch_embed,
        torch.from_numpy(hidden)[None],
        torch.tensor([init_id]),
        core.BeamShape(*shape),
        count,
    )
    return ours, theirs


def _paths(token_ids: np.ndarray, parents: np.ndarray, log_probs: np.ndarray) -> dict[tuple[int, ...], float]:
    """Return every candidate as the tokens from the init token to it, with its score."""
    paths: list[tuple[int, ...]] = []
    for token_id, parent in zip(token_ids.tolist(), parents.tolist(), strict=True):
        paths.append((*(() if parent < 0 else paths[parent]), token_id))
    return {path: score for path, score in zip(paths, log_probs.tolist(), strict=True) if score > float("-inf")}


def _assert_same(ours: Candidates, theirs: core.Candidates) -> None:
    found = _paths(*map(to_numpy, ours))
    expected = _paths(*(column[0].numpy() for column in theirs))
    assert len(ours.token_ids) == theirs.token_ids.shape[1]
    for path in found.keys() | expected.keys():
        # where scores are equal but for rounding, either candidate may be the last one kept
        last = min(score for other, score in expected.items() if len(other) == len(path))
        assert abs(found.get(path, last) - expected.get(path, last)) < TOLERANCE
    assert len(found.keys() ^ expected.keys()) <= 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_candidates_are_those_of_torch(variant: str, shape: tuple[int, int, int | None], tmp_path: Path) -> None:
    twins = load_twins(save_random(tmp_path, **VARIANTS[variant]))

    for seed in range(4):
        hidden = np.random.default_rng(seed).normal(size=HIDDEN).astype(np.float32)
        ours, theirs = _search_both(twins, hidden, seed, shape[:2], shape[2])

        assert len(ours.token_ids) > 50 or shape[0] < 10
        _assert_same(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_candidates_of_the_example_pair_are_those_of_torch(shape: tuple[int, int, int | None]) -> None:
    twins = load_twins(EXAMPLE / "drafter")
    hidden = np.random.default_rng(0).normal(size=256).astype(np.float32)

    _assert_same(*_search_both(twins, hidden, 17, shape[:2], shape[2]))


@pytest.mark.skipif(metadata.version("mlx").startswith("0.29."), reason="what mlx 0.29 compiles for CPUs crashes")
def test_a_compiled_search_finds_the_same() -> None:
    drafter, table = make_drafter(), mx.random.normal((11, 64), key=mx.random.key(1))

    def search(hidden: mx.array, init_id: mx.array) -> tuple[mx.array, ...]:
        return tuple(beam_search.search(drafter, lambda ids: table[ids], hidden, init_id, BeamShape(3, 2), 5))

    arguments = mx.ones(64), mx.array(2)
    mx.enable_compile()
    compiled = mx.compile(search)(*arguments)
    mx.disable_compile()

    for fused, plain in zip(compiled, search(*arguments), strict=True):
        assert mx.allclose(fused, plain, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 1), (1, 0)])
def test_an_empty_shape_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"beam shape .* is not usable: width and length must be at least 1"):
        beam_search.search(
            make_drafter(), lambda ids: mx.zeros((len(ids), 64)), mx.zeros(64), mx.array(0), BeamShape(*shape)
        )
