"""Which of a target's products packed matrices serve; all others stay vLLM's."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional
from vllm import _custom_ops
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from vllm_redrafter.adapter import target_matrices, timing
from vllm_redrafter.adapter.target_matrices import TargetMatrices
from vllm_redrafter.kernels.cpu_library import NotCompiledError
from vllm_redrafter.kernels.few_rows import PackedMatrix

current_platform.import_kernels()
WEIGHT = torch.arange(48.0 * 32).view(48, 32) % 7
TOO_LARGE = (
    "The target's matrices are not packed, so that rows cost more: "
    "they would take more than a quarter of the memory that is free"
)


@pytest.fixture
def packed_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of rows that packed matrices have multiplied."""
    rows: list[int] = []
    original = PackedMatrix.linear

    def linear(self: PackedMatrix, x: torch.Tensor, *arguments: Any) -> None:
        rows.append(len(x))
        original(self, x, *arguments)

    monkeypatch.setattr(PackedMatrix, "linear", linear)
    yield rows
    assert not target_matrices._served  # every test's handlers are gone, and their matrices with them


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned about."""
    said: list[str] = []
    monkeypatch.setattr(target_matrices.logger, "warning", lambda message, *values: said.append(message % values))
    return said


def load(matrices: TargetMatrices, weight: torch.Tensor = WEIGHT) -> Any:
    """Load a layer as vLLM does; return oneDNN's handler."""
    with matrices.packed():
        return _custom_ops.create_onednn_mm(weight.t(), 32)


def check(handler: Any, num_rows: int, bias: torch.Tensor | None = None) -> None:
    x = torch.arange(num_rows * 32.0).view(num_rows, 32) % 5
    assert torch.equal(_custom_ops.onednn_mm(handler, x, bias), functional.linear(x, WEIGHT, bias))


def test_few_rows_are_multiplied_by_packed_matrices_and_more_by_vllm(packed_rows: list[int]) -> None:
    handler = load(TargetMatrices(wanted=True))

    check(handler, 1)
    check(handler, 64, bias=torch.arange(48.0))
    check(handler, 65)

    assert packed_rows == [1, 64]


def test_layers_loaded_before_and_after_are_left_alone(packed_rows: list[int]) -> None:
    stock = _custom_ops.create_onednn_mm
    before = stock(WEIGHT.t(), 32)
    handler = load(TargetMatrices(wanted=True))
    after = _custom_ops.create_onednn_mm(WEIGHT.t(), 32)

    check(before, 2)
    check(after, 2)

    assert packed_rows == []
    assert _custom_ops.create_onednn_mm is stock
    check(handler, 2)


def test_a_load_that_fails_leaves_vllm_as_it_was(packed_rows: list[int]) -> None:
    stock = _custom_ops.create_onednn_mm

    with pytest.raises(ValueError, match="no such file"), TargetMatrices(wanted=True).packed():
        raise ValueError("no such file")

    assert _custom_ops.create_onednn_mm is stock


def test_a_matrix_goes_with_its_layer(packed_rows: list[int]) -> None:
    handler = load(TargetMatrices(wanted=True))
    assert len(target_matrices._served) == 1

    del handler

    assert not target_matrices._served


@pytest.mark.parametrize("wanted", [None, False])
def test_small_targets_are_packed_only_where_that_was_asked_for(wanted: bool | None, packed_rows: list[int]) -> None:
    matrices = TargetMatrices(wanted)
    handler = load(matrices)

    matrices.tune()

    check(handler, 2)
    assert packed_rows == []
    assert not target_matrices._served


def load_several(matrices: TargetMatrices, count: int = 3) -> list[Any]:
    with matrices.packed():
        return [_custom_ops.create_onednn_mm(WEIGHT.t(), 32) for _ in range(count)]


@pytest.mark.parametrize(("num_matrices", "num_packed"), [(1, 0), (2, 2), (3, 3)])
def test_a_target_is_packed_from_the_size_on_that_caches_do_not_hold(
    num_matrices: int, num_packed: int, packed_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_matrices, "_LEAST_BYTES", 2 * WEIGHT.nbytes)

    handlers = load_several(TargetMatrices(), num_matrices)

    assert len(target_matrices._served) == num_packed
    del handlers


def test_a_large_target_is_not_packed_where_that_was_refused(
    packed_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_matrices, "_LEAST_BYTES", 0)

    handlers = load_several(TargetMatrices(wanted=False))

    assert not target_matrices._served
    del handlers


@pytest.mark.parametrize(("reserved", "num_processes", "fits"), [(0, 1, True), (1, 1, False), (0, 2, False)])
def test_a_target_is_packed_where_a_quarter_of_free_memory_holds_it(
    reserved: int,
    num_processes: int,
    packed_rows: list[int],
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    fits: bool,
) -> None:
    monkeypatch.setattr(target_matrices, "_LEAST_BYTES", 0)
    monkeypatch.setattr(target_matrices, "available_bytes", lambda: 4 * 3 * WEIGHT.nbytes)

    handlers = load_several(TargetMatrices(None, reserved, num_processes))

    assert len(target_matrices._served) == (3 if fits else 0)
    assert warnings == ([] if fits else [TOO_LARGE])
    check(handlers[0], 2)
    del handlers


def test_who_asks_for_packed_matrices_gets_them_whatever_memory_there_is(
    packed_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_matrices, "available_bytes", lambda: 0)

    handlers = load_several(TargetMatrices(wanted=True))

    assert len(target_matrices._served) == 3
    del handlers


def test_a_target_that_is_not_packed_is_not_held_while_it_loads(packed_rows: list[int]) -> None:
    weight = WEIGHT.clone()
    original = weakref.ref(weight)

    with TargetMatrices(wanted=False).packed():
        handler = _custom_ops.create_onednn_mm(weight.t(), 32)
        del weight
        assert original() is None

    check(handler, 2)


@pytest.mark.parametrize("wanted", [True, None])
def test_other_number_formats_stay_with_vllm_and_who_asked_is_told(
    packed_rows: list[int], warnings: list[str], monkeypatch: pytest.MonkeyPatch, *, wanted: bool | None
) -> None:
    monkeypatch.setattr(_custom_ops, "create_onednn_mm", lambda weight, size: object())

    load(TargetMatrices(wanted), WEIGHT.bfloat16())

    assert not target_matrices._served
    nothing = "pack_target changes nothing: the target has no fp32 matrices that oneDNN multiplies"
    assert warnings == ([nothing] if wanted else [])


@pytest.mark.parametrize(("packed_seconds", "most_rows"), [([1, 1, 3], 8), ([3], 0), ([1] * 5, 64)])
def test_the_most_rows_are_the_last_before_vllm_is_as_fast(
    packed_seconds: list[float], most_rows: int, packed_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_matrices, "_LEAST_BYTES", 0)
    matrices = TargetMatrices()
    handler = load(matrices)
    left = iter(packed_seconds)
    monkeypatch.setattr(matrices, "_seconds", lambda rows: (next(left), 2.0))

    matrices.tune()

    assert matrices.most_rows == most_rows
    assert len(target_matrices._served) == (most_rows > 0)
    check(handler, max(1, most_rows))
    check(handler, most_rows + 1)
    assert packed_rows == [most_rows][: most_rows > 0]


def test_both_ways_are_timed_with_the_rows_in_question(packed_rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_matrices, "_LEAST_BYTES", 0)
    matrices = TargetMatrices()
    handler = load(matrices)

    packed, stock = matrices._seconds(8)

    assert min(packed, stock) > 0
    assert packed_rows == [8] * (1 + timing.NUM_TIMED)
    del handler


class Embedding(VocabParallelEmbedding):  # type: ignore[misc]
    """One whose weight vLLM hands to oneDNN."""

    def __init__(self, weight: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.weight = weight


class Target(torch.nn.Module):
    """A model that embeds with one matrix and has a layer and a head."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = Embedding(WEIGHT.clone())
        self.head = self.embedding if tied else Embedding(WEIGHT.clone())
        self.layer = _custom_ops.create_onednn_mm(WEIGHT.clone().t(), 32)
        self.handlers = [_custom_ops.create_onednn_mm(module.weight.t(), 32) for module in (self.embedding, self.head)]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return _custom_ops.onednn_mm(self.handlers[1], hidden, None)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_is_no_head_is_not_held_packed(packed_rows: list[int], *, tied: bool) -> None:
    matrices = TargetMatrices(wanted=True)
    with matrices.packed():
        target = Target(tied=tied)

    matrices.forget_embeddings(target, torch.zeros(1, 32))

    assert len(target_matrices._served) == 2
    packed_rows.clear()
    check(target.layer, 3)
    check(target.handlers[1], 4)
    assert packed_rows == [3, 4]
    check(target.handlers[0], 5)
    assert packed_rows == [3, 4]
    del target


def test_a_target_that_is_not_packed_is_not_asked_for_logits(packed_rows: list[int]) -> None:
    matrices = TargetMatrices(wanted=False)

    matrices.forget_embeddings(torch.nn.Module(), torch.zeros(1, 32))

    assert not target_matrices._served


def test_without_a_compiler_all_products_stay_with_vllm_and_a_warning_says_so(
    packed_rows: list[int], warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(weight: torch.Tensor) -> None:
        raise NotCompiledError("no C++ compiler")

    monkeypatch.setattr(target_matrices, "PackedMatrix", fail)
    handlers = load_several(TargetMatrices(wanted=True))

    check(handlers[0], 3)
    assert packed_rows == []
    assert warnings == ["The target's matrices are not packed, so that rows cost more: no C++ compiler"]
