from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from tests.adapter.trees import draft_tree, random_tree
from vllm_redrafter.adapter import attention, attention_pass, attention_rounds, tree_batch
from vllm_redrafter.adapter.attention import TreeAttention, TreeAttentionImpl, TreeAttentionMetadata
from vllm_redrafter.adapter.attention_pass import TreePass, caches_served
from vllm_redrafter.adapter.attention_rounds import Call, Segment, TreeRounds
from vllm_redrafter.adapter.runner import TreeModelRunner
from vllm_redrafter.adapter.target_matrices import TargetMatrices
from vllm_redrafter.adapter.tree_batch import path_to
from vllm_redrafter.adapter.verification import Walk
from vllm_redrafter.core.token_tree import TokenTree, attention_mask
from vllm_redrafter.kernels import cpu_tree_attention
from vllm_redrafter.kernels.batch import ancestor_words
from vllm_redrafter.kernels.cpu_library import NotCompiledError

BLOCK = 32
POISON = 1e4
"""Stands where nothing was written; not NaN, because the kernel multiplies the values that it masks by zero."""
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
FP8_POISON = {"fp8_e4m3": 0x7E, "fp8_e5m2": 0x7B}  # the largest finite numbers


class Layer(NamedTuple):
    """What kind of attention a model has."""

    head_size: int = 32
    num_heads: int = 4
    num_kv_heads: int = 2
    dtype: torch.dtype = torch.float32
    kv_cache_dtype: str = "auto"
    sliding_window: int | None = None
    soft_cap: float | None = None

    @property
    def tolerance(self) -> float:
        """Rounding of the kernel: inputs are of unit scale, and bfloat16 keeps 8 bits of keys, weights and outputs."""
        if self.dtype == torch.float32:
            return 1e-5
        # on AMX the stock kernel is off by 0.05 on plain rows when it reads fp8 too
        return 4e-2 if self.kv_cache_dtype == "auto" else 8e-2


class Request(NamedTuple):
    """One request of a batch: what is cached, the prompt's rows of this step, and the tree behind the last of them."""

    context: int
    num_prompt_rows: int = 0
    tree: TokenTree | None = None

    @property
    def num_rows(self) -> int:
        return self.num_prompt_rows + 1 + (0 if self.tree is None else int(self.tree.num_nodes[0]))


LAYERS = {
    "GQA": Layer(),
    "one head": Layer(num_heads=2, num_kv_heads=1),
    "MHA": Layer(num_heads=3, num_kv_heads=3, head_size=64),
    "head size 80": Layer(head_size=80),
    "bfloat16": Layer(dtype=torch.bfloat16, head_size=64, num_heads=8),
    "bfloat16, head size 80": Layer(dtype=torch.bfloat16, head_size=80),
    "sliding window": Layer(sliding_window=7),
    "sliding window over a block": Layer(sliding_window=BLOCK + 5, head_size=64),
    "soft cap": Layer(soft_cap=2.0),
    "fp8 keys and values": Layer(kv_cache_dtype="fp8_e4m3", head_size=64),
    "fp8 keys and values, bfloat16": Layer(kv_cache_dtype="fp8_e4m3", head_size=64, dtype=torch.bfloat16),
    "fp8 of 5 exponent bits": Layer(kv_cache_dtype="fp8_e5m2", head_size=32),
}


class Step:
    """One verification step of one layer: vLLM's kernel around a cache in which only the context was written.

    vLLM's own constructors need a model's whole configuration; here the attributes that they would set are set by hand.
    """

    def __init__(
        self, layer: Layer, requests: Sequence[Request], seed: int, how: type[TreeAttention] = TreeRounds
    ) -> None:
        rng = np.random.default_rng(seed)
        self.layer, self.requests, self.how = layer, requests, how
        isa = cpu_attn._get_attn_isa(layer.dtype, BLOCK, layer.head_size, layer.kv_cache_dtype)
        self.impl = _impl(layer)
        self.builder = _builder(layer, isa)

        drafts = {str(i): draft_tree(r.tree) for i, r in enumerate(requests) if r.tree is not None}
        self.query_ends = np.cumsum([request.num_rows for request in requests]).tolist()
        scheduled = {request: tree.token_ids for request, tree in drafts.items()}
        self.batch = tree_batch.assemble(drafts, [str(i) for i in range(len(requests))], scheduled, self.query_ends)
        self.starts = [0, *self.query_ends[:-1]]

        lengths = [request.context + request.num_rows for request in requests]
        needed = [-(-length // BLOCK) for length in lengths]
        order = rng.permutation(sum(needed) + 2)  # two blocks belong to nobody
        self.block_table = torch.zeros(len(requests), max(needed), dtype=torch.int32)
        for index, blocks in enumerate(np.split(order, np.cumsum(needed))[:-1]):
            self.block_table[index, : len(blocks)] = torch.from_numpy(blocks)
        self.cache = _poisoned_cache(layer, len(order))

        shape = (sum(lengths), layer.num_kv_heads, layer.head_size)
        keys, values = (_representable(torch.from_numpy(rng.standard_normal(shape)), layer) for _ in range(2))
        query = rng.standard_normal((self.query_ends[-1], layer.num_heads, layer.head_size))
        self.query = torch.from_numpy(query).to(layer.dtype)
        offsets = np.cumsum([0, *lengths])
        self.context_rows = _ranges([(o, o + r.context) for o, r in zip(offsets, requests, strict=False)])
        own_rows = _ranges([(o + r.context, o + n) for o, r, n in zip(offsets, requests, lengths, strict=False)])
        self.all_keys, self.all_values = keys, values
        self.key, self.value = keys[own_rows], values[own_rows]
        self.slots = torch.cat([self.slots_of(i, r.context, r.num_rows) for i, r in enumerate(requests)])

        self.module = SimpleNamespace(
            layer_name="layer", isa=isa, _k_scale_float=1.0, _v_scale_float=1.0, impl=self.impl, kv_cache=self.cache
        )
        self.write_context(self.cache)
        self.metadata = self._metadata(lengths)

    def slots_of(self, request: int, start: int, count: int) -> torch.Tensor:
        """Return the slots of `count` positions of a request from `start` on."""
        positions = torch.arange(start, start + count)
        return self.block_table[request].long()[positions // BLOCK] * BLOCK + positions % BLOCK

    def write(self, cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Write keys and values as vLLM does."""
        self.impl.do_kv_cache_update(self.module, key, value, cache, slots)

    def write_context(self, cache: torch.Tensor) -> None:
        slots = torch.cat([self.slots_of(i, 0, request.context) for i, request in enumerate(self.requests)])
        self.write(cache, self.all_keys[self.context_rows], self.all_values[self.context_rows], slots)

    def forward(self) -> torch.Tensor:
        """Return the attention's output, [num_tokens, num_heads, head_size]; NaN where nothing was written."""
        # vLLM writes all rows to the scheduler's linear slots before it calls the implementation
        self.write(self.cache, self.key, self.value, self.slots)
        output = torch.full_like(self.query, float("nan"))
        arguments = (self.query, self.key, self.value, self.cache, self.metadata, output)
        returned = self.impl.forward(self.module, *arguments)
        # under torch.compile these buffers serve the next layer
        self.key.fill_(POISON)
        self.value.fill_(POISON)
        assert returned is output
        return output

    def expected(self) -> torch.Tensor:
        """Return the same in float64, from a mask."""
        layer = self.layer
        keys, values = self.all_keys.double(), self.all_values.double()
        group = layer.num_heads // layer.num_kv_heads
        outputs = []
        offset = 0
        for request, start, end in zip(self.requests, self.starts, self.query_ends, strict=True):
            length = request.context + request.num_rows
            key, value = (x[offset : offset + length].repeat_interleave(group, dim=1) for x in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", self.query[start:end].double(), key) * layer.head_size**-0.5
            if layer.soft_cap is not None:
                scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
            weights = scores.masked_fill(~self.visible(request), float("-inf")).softmax(dim=-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, value))
            offset += length
        return torch.cat(outputs)

    def visible(self, request: Request) -> torch.Tensor:
        """Return which row of a request sees which of its keys, [num_rows, context + num_rows]."""
        num_linear = request.context + request.num_prompt_rows
        mask = torch.ones(request.num_rows, num_linear + request.num_rows - request.num_prompt_rows, dtype=torch.bool)
        mask = mask.tril(diagonal=request.context)
        positions = torch.arange(mask.shape[1])
        if request.tree is not None:
            size = 1 + int(request.tree.num_nodes[0])
            mask[request.num_prompt_rows :, num_linear:] = attention_mask(request.tree)[0, :size, :size]
            positions[num_linear:] = num_linear + request.tree.depths[0, :size]
        if self.layer.sliding_window is not None:
            distance = positions[request.context :, None] - positions
            mask &= distance < self.layer.sliding_window
        return mask

    def commit(self, nodes: Sequence[list[int]]) -> None:
        """Let the runner commit the accepted path of every request, given as nodes from the root."""
        runner = SimpleNamespace(
            _tree_metadata=[self.metadata],
            _batch=self.batch,
            stats=SimpleNamespace(num_commits=0),
            compilation_config=SimpleNamespace(static_forward_context={"layer": self.module}),
        )
        TreeModelRunner._commit(runner, Walk([], list(nodes)))  # type: ignore[arg-type]

    def holds_chains(self, nodes: Sequence[list[int]]) -> bool:
        """Return whether the cache holds, bit for bit, what plain decoding of these paths would have written.

        Whatever stands behind the paths is overwritten in both caches: no request ever reads it.
        """
        plain = _poisoned_cache(self.layer, len(self.cache))
        self.write_context(plain)
        for index, (request, path) in enumerate(zip(self.requests, nodes, strict=True)):
            rows = list(range(request.num_prompt_rows)) + [request.num_prompt_rows + node for node in path]
            offset = sum(other.context + other.num_rows for other in self.requests[:index]) + request.context
            taken = torch.tensor(rows) + offset
            slots = self.slots_of(index, request.context, len(rows))
            self.write(plain, self.all_keys[taken], self.all_values[taken], slots)
            behind = self.slots_of(index, request.context + len(rows), request.num_rows - len(rows))
            zeros = torch.zeros(len(behind), self.layer.num_kv_heads, self.layer.head_size, dtype=self.layer.dtype)
            for cache in (plain, self.cache):
                self.write(cache, zeros, zeros, behind)
        return torch.equal(plain.view(torch.uint8), self.cache.view(torch.uint8))

    @property
    def rounds(self) -> list[attention_rounds.Round]:
        assert isinstance(self.trees, TreeRounds)
        return self.trees.rounds

    def first_paths(self) -> list[list[int]]:
        paths = [tree_batch.path_segments(tree.parents)[0] for tree in self.batch.trees]
        return [list(range(*path)) for path in paths]

    def _metadata(self, lengths: list[int]) -> CPUAttentionMetadata:
        query_start_loc = torch.tensor([0, *self.query_ends], dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=query_start_loc,
            query_start_loc_cpu=query_start_loc,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            num_reqs=len(self.requests),
            num_actual_tokens=self.query_ends[-1],
            max_query_len=int(query_start_loc.diff().max()),
            max_seq_len=max(lengths),
            block_table_tensor=self.block_table,
            slot_mapping=self.slots,
            causal=True,
        )
        stock = self.builder.build(0, common)
        self.trees = self._trees(stock)
        return TreeAttentionMetadata.of(stock, self.trees, ["layer"])

    def _trees(self, stock: CPUAttentionMetadata) -> TreeAttention:
        computed = [request.context for request in self.requests]
        if self.how is TreeRounds:
            return TreeRounds(stock, self.builder, self.batch.segments(self.query_ends, computed))
        ancestors = self.batch.ancestors(self.query_ends)
        assert ancestors is not None
        caches = caches_served(self.builder, {"layer": self.module})
        return TreePass(stock, self.builder, caches, self.batch.requests(self.query_ends, computed), ancestors)


def _impl(layer: Layer) -> TreeAttentionImpl:
    impl = object.__new__(TreeAttentionImpl)
    impl.__dict__.update(
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_size=layer.head_size,
        scale=layer.head_size**-0.5,
        alibi_slopes=None,
        sliding_window=-1 if layer.sliding_window is None else layer.sliding_window,
        logits_soft_cap=layer.soft_cap or 0,
        kv_cache_dtype=layer.kv_cache_dtype,
        is_fp8_kv_cache=layer.kv_cache_dtype != "auto",
        attn_type=cpu_attn.AttentionType.DECODER,
        sinks=None,
        use_zentorch_sdpa=False,
    )
    return impl


def _builder(layer: Layer, isa: str) -> CPUAttentionMetadataBuilder:
    builder = object.__new__(CPUAttentionMetadataBuilder)
    builder.__dict__.update(
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_size,
        dtype=layer.dtype,
        window_size=-1 if layer.sliding_window is None else layer.sliding_window,
        block_size=BLOCK,
        kv_cache_dtype=layer.kv_cache_dtype,
        isa=isa,
        is_cross_attention=False,
        is_encoder_only_attention=False,
    )
    return builder


def _poisoned_cache(layer: Layer, num_blocks: int) -> torch.Tensor:
    shape = (num_blocks, layer.num_kv_heads, BLOCK, 2 * layer.head_size)
    if layer.kv_cache_dtype != "auto":
        return torch.full(shape, FP8_POISON[layer.kv_cache_dtype], dtype=torch.uint8)
    return torch.full(shape, POISON, dtype=layer.dtype)


def _representable(values: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Return values that the cache keeps as they are: the kernel cuts to fp8 where torch rounds."""
    return (values if layer.kv_cache_dtype == "auto" else values.to(FP8[layer.kv_cache_dtype])).to(layer.dtype)


def _ranges(bounds: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([torch.arange(start, end) for start, end in bounds])


def random_request(rng: np.random.Generator) -> Request:
    """Return a prompt's chunk, a plain decoding step, a chain or a branching tree, often around a block's boundary."""
    kind = rng.integers(5)
    boundary = int(rng.integers(3)) * BLOCK
    context = max(0, boundary + int(rng.integers(-4, 4))) if rng.random() < 0.6 else int(rng.integers(80))
    if kind == 0:
        return Request(context, int(rng.integers(1, 40)))
    if kind == 1:
        return Request(context)
    width = 1 if kind == 2 else int(rng.integers(2, 9))
    tree = random_tree(rng, int(rng.integers(1, 40)), width, int(rng.integers(1, 7)))
    # a resumed request has rows of its prompt before a tree
    return Request(context, int(rng.integers(1, 5)) if rng.random() < 0.2 else 0, tree)


def random_step(layer: Layer, seed: int, how: type[TreeAttention] = TreeRounds) -> Step:
    """Return a step in which at least one tree branches."""
    rng = np.random.default_rng(seed)
    requests = [random_request(rng) for _ in range(int(rng.integers(1, 6)))]
    requests.insert(int(rng.integers(len(requests) + 1)), Request(int(rng.integers(1, 80)), 0, BRANCHING))
    return Step(layer, requests, seed, how)


BRANCHING = random_tree(np.random.default_rng(0), 12, 6, 4)


def random_paths(step: Step, seed: int) -> list[list[int]]:
    """Return for every request the path to a random node: what an acceptance walk may accept."""
    rng = np.random.default_rng(seed)
    return [path_to(tree.parents, int(rng.integers(len(tree.parents)))) for tree in step.batch.trees]


def worst_error(step: Step) -> float:
    """Return the largest deviation from the dense reference; infinite where an output was not written."""
    expected = step.expected()
    return float((step.forward().double() - expected).abs().nan_to_num(nan=float("inf")).max())


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def layer(request: pytest.FixtureRequest) -> Layer:
    chosen: Layer = request.param
    # vLLM's own condition
    if chosen.kv_cache_dtype != "auto" and not torch.cpu._is_avx512_supported():
        pytest.skip("fp8 keys and values need AVX-512")
    return chosen


WAYS: list[type[TreeAttention]] = [TreeRounds, TreePass]


@pytest.fixture(params=WAYS)
def how(request: pytest.FixtureRequest, layer: Layer) -> type[TreeAttention]:
    """Ways to serve trees, as far as there are kernels for the layer."""
    chosen: type[TreeAttention] = request.param
    if chosen is TreePass and not is_served_in_one_pass(layer):
        pytest.skip("served in rounds alone")
    return chosen


def is_served_in_one_pass(layer: Layer) -> bool:
    return (
        layer.dtype == torch.float32
        and layer.kv_cache_dtype == "auto"
        and layer.head_size % cpu_tree_attention.panel_width() == 0
    )


def test_fp32_layers_are_served_in_one_pass_and_others_are_not(layer: Layer) -> None:
    step = random_step(layer, 0)

    assert bool(caches_served(step.builder, {"layer": step.module})) == is_served_in_one_pass(layer)


@pytest.mark.parametrize("seed", range(12))
def test_mixed_batches_of_trees_chains_prompts_and_plain_rows_equal_dense_attention(
    layer: Layer, how: type[TreeAttention], seed: int
) -> None:
    step = random_step(layer, seed, how)
    assert step.batch.num_branching > 0

    assert worst_error(step) <= layer.tolerance


@pytest.mark.parametrize("seed", range(12))
def test_the_first_path_stays_in_the_cache_and_any_other_does_after_its_commit(
    layer: Layer, how: type[TreeAttention], seed: int
) -> None:
    first, other = random_step(layer, seed, how), random_step(layer, seed, how)
    first.forward()
    other.forward()
    paths = random_paths(other, seed)

    other.commit(paths)

    assert first.holds_chains(first.first_paths())
    assert other.holds_chains(paths)


@pytest.mark.parametrize("how", WAYS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_any_batch_is_served_and_committed(how: type[TreeAttention], seed: int) -> None:
    step = random_step(LAYERS["GQA"], seed, how)

    assert worst_error(step) <= step.layer.tolerance

    paths = random_paths(step, seed)
    step.commit(paths)
    assert step.holds_chains(paths)


def test_prompts_of_more_rows_than_a_word_has_bits_stay_with_the_stock_kernel() -> None:
    requests = [Request(3, 100), Request(40, 0, BRANCHING), Request(0, 65), Request(7, 63), Request(20)]
    step = Step(LAYERS["GQA"], requests, 6, TreePass)

    assert [len(words) for words in step.batch.ancestors(step.query_ends) or []] == [0, 13, 0, 64, 1]
    assert worst_error(step) <= step.layer.tolerance


def test_a_tree_and_a_prompt_of_more_rows_than_a_word_has_bits_are_served_in_rounds() -> None:
    requests = [Request(40, 60, BRANCHING), Request(7)]

    assert Step(LAYERS["GQA"], requests, 6).batch.ancestors([73, 74]) is None


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("context", [0, 1, BLOCK - 3, BLOCK - 1, BLOCK, 2 * BLOCK])
def test_a_tree_may_cross_the_boundary_of_a_block(context: int, how: type[TreeAttention]) -> None:
    step = Step(LAYERS["GQA"], [Request(context, 0, BRANCHING)], 3, how)

    assert worst_error(step) <= step.layer.tolerance
    assert step.holds_chains(step.first_paths())


def test_the_largest_tree_is_served_in_as_many_calls_as_it_has_leaves() -> None:
    tree = random_tree(np.random.default_rng(5), 63, 24, 6)
    step = Step(LAYERS["MHA"], [Request(45, 0, tree), Request(9)], seed=5)
    parents = tree.parents[0].tolist()
    num_leaves = sum(node not in parents for node in range(len(parents)))

    assert worst_error(step) <= step.layer.tolerance
    assert len(step.rounds) == num_leaves > 10


def test_metadata_of_a_batch_without_branches_goes_to_the_stock_kernel_unchanged() -> None:
    step = random_step(LAYERS["GQA"], 1)
    stock = {name: getattr(step.metadata, name) for name in CPUAttentionMetadata.__dataclass_fields__}
    step.metadata = CPUAttentionMetadata(**stock)
    expected = torch.full_like(step.query, float("nan"))
    step.write(step.cache, step.key, step.value, step.slots)
    arguments = (step.module, step.query, step.key.clone(), step.value.clone(), step.cache, step.metadata, expected)
    super(TreeAttentionImpl, step.impl).forward(*arguments)

    assert torch.equal(step.forward(), expected)


def test_the_warm_up_pass_without_metadata_returns_its_output() -> None:
    step = random_step(LAYERS["GQA"], 1)
    output = torch.zeros_like(step.query)

    returned = step.impl.forward(step.module, step.query, step.key, step.value, step.cache, None, output)

    assert returned is output


def test_a_target_with_attention_of_another_kind_is_refused_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUModelRunner, "load_model", lambda self: None)
    runner = object.__new__(TreeModelRunner)
    runner._matrices = TargetMatrices(wanted=False)
    runner.lora_config = SimpleNamespace()  # type: ignore[assignment]
    layers: dict[str, object] = {"layers.0": object.__new__(Attention)}
    runner.vllm_config = SimpleNamespace(  # type: ignore[assignment]
        compilation_config=SimpleNamespace(static_forward_context=layers)
    )
    runner.load_model()

    layers["layers.1"] = object.__new__(ChunkedLocalAttention)
    with pytest.raises(NotImplementedError, match=r"ChunkedLocalAttention layers, of which layers\.1 is one"):
        runner.load_model()


@pytest.mark.parametrize("adapters", [None, "LoRA"])
def test_a_loaded_target_without_adapters_is_asked_what_it_multiplies(
    adapters: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, tuple[int, ...]]] = []
    monkeypatch.setattr(CPUModelRunner, "load_model", lambda self: None)
    monkeypatch.setattr(
        TargetMatrices, "forget_embeddings", lambda self, model, hidden: asked.append((model, tuple(hidden.shape)))
    )
    runner: Any = object.__new__(TreeModelRunner)
    runner._matrices, runner.lora_config, runner.model, runner.dtype = (
        TargetMatrices(),
        adapters,
        "model",
        torch.float32,
    )
    runner.model_config = SimpleNamespace(get_hidden_size=lambda: 8)
    runner.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))

    runner.load_model()

    assert asked == ([] if adapters else [("model", (1, 8))])


def test_rounds_that_do_not_write_their_paths_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_rounds, "write", lambda *args: None)

    assert worst_error(random_step(LAYERS["GQA"], 2)) > 0.1


def test_a_path_one_slot_too_short_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Call.plan

    def shortened(metadata: Any, builder: Any, segments: Sequence[Segment]) -> Call:
        return plan(metadata, builder, [segment._replace(seq_len=segment.seq_len - 1) for segment in segments])

    monkeypatch.setattr(Call, "plan", shortened)

    assert worst_error(random_step(LAYERS["GQA"], 2)) > 0.1


def test_a_pass_in_which_nodes_see_all_that_lie_before_them_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_batch, "ancestor_words", lambda parents: ancestor_words(range(-1, len(parents) - 1)))

    assert worst_error(random_step(LAYERS["GQA"], 2, TreePass)) > 0.1


def test_a_cache_of_another_layout_is_noticed_and_served_in_rounds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = random_step(LAYERS["MHA"], 2)
    stock = TreeAttentionImpl.do_kv_cache_update

    def exchanged(self: Any, layer: Any, key: Any, value: Any, *rest: Any) -> None:
        stock(self, layer, value, key, *rest)

    monkeypatch.setattr(TreeAttentionImpl, "do_kv_cache_update", exchanged)
    monkeypatch.setattr(attention_pass.logger, "propagate", True)
    monkeypatch.setattr(TreeAttentionImpl, "forward", lambda self, *arguments: arguments[-1].zero_())

    assert caches_served(step.builder, {"layer": step.module}) == {}
    assert "leaf by leaf, which costs more: vLLM's cache is not what our kernel takes it for" in caplog.text


def test_without_a_compiler_trees_are_served_in_rounds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def supports(*_: Any) -> bool:
        raise NotCompiledError("No working C++ compiler")

    step = random_step(LAYERS["GQA"], 2)
    monkeypatch.setattr(cpu_tree_attention, "supports", supports)
    monkeypatch.setattr(attention_pass.logger, "propagate", True)

    assert caches_served(step.builder, {"layer": step.module}) == {}
    assert "leaf by leaf, which costs more: No working C++ compiler" in caplog.text


@pytest.mark.parametrize("attribute", ["alibi_slopes", "sinks"])
def test_what_the_kernel_does_not_know_is_served_in_rounds_without_a_word(
    attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = random_step(LAYERS["GQA"], 2)
    setattr(step.impl, attribute, torch.ones(4))
    warnings: list[Any] = []
    monkeypatch.setattr(attention_pass.logger, "warning", lambda *message: warnings.append(message))

    assert caches_served(step.builder, {"layer": step.module}) == {}
    assert warnings == []


@pytest.mark.parametrize("how", WAYS)
def test_a_commit_that_is_dropped_is_noticed(monkeypatch: pytest.MonkeyPatch, how: type[TreeAttention]) -> None:
    monkeypatch.setattr(attention, "commit", lambda *args: None)
    step = Step(LAYERS["GQA"], [Request(30, 0, BRANCHING)], 4, how)
    parents = step.batch.trees[0].parents
    step.forward()

    step.commit([path_to(parents, len(parents) - 1)])

    assert not step.holds_chains([path_to(parents, len(parents) - 1)])


def test_a_first_path_that_is_not_the_last_one_served_is_noticed() -> None:
    step = Step(LAYERS["GQA"], [Request(30, 0, BRANCHING)], seed=4)
    step.rounds.reverse()
    step.forward()

    assert not step.holds_chains(step.first_paths())
