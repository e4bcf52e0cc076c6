from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.core import naive
from vllm_redrafter.core import token_tree
from vllm_redrafter.core.beam_search import SHARPNESS, BeamShape
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.decoding import Generation, Sample, Target, autoregressive, generate
from vllm_redrafter.core.drafter import ReDrafter
from vllm_redrafter.core.token_tree import TokenTree

HIDDEN = 32
# so small that a random drafter's trees are accepted now and then
VOCAB = 11
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    # far apart logits: no argmax hangs on float32's last digit
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
TARGETS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "llama with as many kv heads as heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with tied embeddings": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "llama, eager attention": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, attn_implementation="eager")),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=None)),
    "mistral, window of 64": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=64)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**GROUPED, head_dim=8)),
    "gemma 2": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=3.0)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.4,
            eos_token_id=None,
        )
    ),
}
SHAPES = [(1, 1, 1), (3, 2, 5), (8, 5, 30), (45, 4, 63)]
NUM_NEW_TOKENS = 36


@cache
def make_target(name: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    target = TARGETS[name]().eval().requires_grad_(False)
    target.generation_config.eos_token_id = None
    return target


@cache
def make_drafter(vocab_size: int = VOCAB) -> ReDrafter:
    torch.manual_seed(1)
    return ReDrafter(ReDrafterConfig(hidden_size=HIDDEN, vocab_size=vocab_size)).eval().requires_grad_(False)


@cache
def make_fused_drafter() -> ReDrafter:
    torch.manual_seed(1)
    drafter = ReDrafter(ReDrafterConfig(hidden_size=HIDDEN, vocab_size=VOCAB, fused_layers=[0, 1]))
    nn.init.normal_(drafter.fc.weight, std=0.3)
    return drafter.eval().requires_grad_(False)


@cache
def make_pair() -> tuple[PreTrainedModel, ReDrafter, torch.Tensor]:
    """Return a target with more tokens, a drafter that has learnt what it says after some prompts, and those."""
    torch.manual_seed(2)
    vocab_size = 50
    target = LlamaForCausalLM(LlamaConfig(**{**GROUPED, "vocab_size": vocab_size})).eval().requires_grad_(False)
    prompts = torch.randint(vocab_size, (8, 6))
    texts = torch.stack(
        [torch.cat((p, torch.tensor(autoregressive(target, p, NUM_NEW_TOKENS).token_ids))) for p in prompts]
    )
    hidden = target(texts, output_hidden_states=True).hidden_states[-1]  # [8, 46, hidden_size]
    embed = target.get_input_embeddings()
    drafter = ReDrafter(ReDrafterConfig(hidden_size=HIDDEN, vocab_size=vocab_size, num_draft_layers=1))
    optimizer = torch.optim.Adam(drafter.parameters(), lr=5e-3)
    depth = 3
    starts = range(texts.shape[1] - depth - 1)
    for _ in range(60):
        loss = torch.zeros(())
        state = drafter.start(hidden[:, starts])
        for i in range(1, depth + 1):
            state = drafter.advance(state, embed(texts[:, i : i + len(starts)]))
            wanted = texts[:, i + 1 : i + 1 + len(starts)]
            loss = loss + functional.cross_entropy(drafter.logits(state).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return target, drafter.eval().requires_grad_(False), prompts


def prompt(length: int, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(length))


def hugging_face_greedy(target: PreTrainedModel, input_ids: torch.Tensor, max_new_tokens: int) -> list[int]:
    output = target.generate(
        input_ids[None],
        attention_mask=torch.ones(1, len(input_ids), dtype=torch.int64),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return output[0, len(input_ids) :].tolist()


def num_branches(generation: Generation) -> int:
    """Return how many accepted paths were not the tree's first."""
    return sum(path != list(range(1, 1 + len(path))) for path in generation.paths)


def assert_consistent(generation: Generation, max_new_tokens: int) -> None:
    drawn = 1 + sum(num_accepted + 1 for num_accepted in generation.num_accepted)
    assert len(generation.token_ids) == max_new_tokens <= drawn
    assert drawn - (1 + generation.num_accepted[-1]) < max_new_tokens, "there was a step too many"


@pytest.mark.parametrize("name", TARGETS)
def test_greedy_text_is_that_of_hugging_faces_generate(name: str) -> None:
    target, drafter = make_target(name), make_drafter()
    accepted, branches = 0, 0
    for length in (1, 9):
        input_ids = prompt(length)
        expected = hugging_face_greedy(target, input_ids, NUM_NEW_TOKENS)
        assert autoregressive(target, input_ids, NUM_NEW_TOKENS).token_ids == expected
        for width, depth, num_nodes in SHAPES:
            generation = generate(
                target, drafter, input_ids, NUM_NEW_TOKENS, shape=BeamShape(width, depth), num_nodes=num_nodes
            )
            assert generation.token_ids == expected
            assert_consistent(generation, NUM_NEW_TOKENS)
            accepted += sum(generation.num_accepted)
            branches += num_branches(generation)
    assert accepted > 40
    assert branches > 20


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_fused_layers_change_what_is_drafted_and_never_the_text(name: str) -> None:
    target, drafter, input_ids = make_target(name), make_fused_drafter(), prompt(9)
    shape = BeamShape(3, 3)

    fused = generate(target, drafter, input_ids, NUM_NEW_TOKENS, shape=shape, num_nodes=8)

    # the same tensors, but for what the fused layers add
    plain = generate(target, make_drafter(), input_ids, NUM_NEW_TOKENS, shape=shape, num_nodes=8)
    assert fused.token_ids == plain.token_ids == hugging_face_greedy(target, input_ids, NUM_NEW_TOKENS)
    assert fused.paths != plain.paths


def test_a_drafter_that_has_learnt_its_target_saves_most_steps() -> None:
    target, drafter, prompts = make_pair()

    for input_ids in prompts[:4]:
        expected = hugging_face_greedy(target, input_ids, NUM_NEW_TOKENS)
        tree = generate(target, drafter, input_ids, NUM_NEW_TOKENS, shape=BeamShape(4, 4), num_nodes=12)
        line = generate(target, drafter, input_ids, NUM_NEW_TOKENS, shape=BeamShape(1, 4), num_nodes=12)

        assert tree.token_ids == line.token_ids == expected
        assert tree.mean_acceptance_length > 2.5
        assert tree.num_steps == len(tree.paths) < NUM_NEW_TOKENS / 2.5
        assert num_branches(line) == 0


@pytest.mark.parametrize(("width", "length", "num_nodes"), [(1, 3, 3), (3, 4, 6), (6, 3, 30)])
def test_every_step_accepts_what_the_equations_in_loops_say(width: int, length: int, num_nodes: int) -> None:
    target, drafter, prompts = make_pair()
    branches = 0
    for input_ids in prompts[:3]:
        generation = generate(
            target, drafter, input_ids, NUM_NEW_TOKENS, shape=BeamShape(width, length), num_nodes=num_nodes
        )
        branches += num_branches(generation)

        # past what generate wanted, so that the last verification can be followed to its end
        text = autoregressive(target, input_ids, NUM_NEW_TOKENS + length).token_ids
        everything = torch.cat((input_ids, torch.tensor(text)))
        hidden = target(everything[None], output_hidden_states=True).hidden_states[-1][0]
        root, paths = 0, []
        while root < NUM_NEW_TOKENS - 1:
            log_probs = naive.drafter_log_probs(
                drafter,
                target.get_input_embeddings().weight,
                hidden[len(input_ids) + root - 1],
                text[root],
                SHARPNESS,
            )
            found = naive.beam_search(log_probs, width, length, num_nodes if width > 1 else 1)
            nodes = naive.layout({k: v for depth in found.candidates for k, v in depth.items()}, num_nodes)
            emitted = naive.accept(nodes, lambda prefix, rest=text[root + 1 :]: rest[len(prefix)])
            paths.append([1 + nodes.index(emitted[:i]) for i in range(1, len(emitted))])
            root += len(emitted)
        assert generation.paths == paths
    assert branches > 0 or width == 1


def sampler(seed: int, temperature: float = 1.0) -> Sample:
    generator = torch.Generator().manual_seed(seed)

    def sample(logits: torch.Tensor) -> torch.Tensor:
        return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)[:, 0]

    return sample


@pytest.mark.parametrize("name", ["llama", "gemma 2", "gpt2"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampled_text_is_that_of_the_target_alone_with_the_same_seed(name: str, temperature: float) -> None:
    target, drafter = make_target(name), make_drafter()
    accepted, branches, texts = 0, 0, set()
    for seed, (width, depth, num_nodes) in enumerate(SHAPES * 2):
        state = torch.get_rng_state()
        expected = autoregressive(target, prompt(9), NUM_NEW_TOKENS, sample=sampler(seed, temperature))
        generation = generate(
            target,
            drafter,
            prompt(9),
            NUM_NEW_TOKENS,
            shape=BeamShape(width, depth),
            num_nodes=num_nodes,
            sample=sampler(seed, temperature),
        )
        assert generation.token_ids == expected.token_ids
        assert torch.get_rng_state().equal(state)
        accepted += sum(generation.num_accepted)
        branches += num_branches(generation)
        texts.add(tuple(expected.token_ids))
    assert accepted > 20
    assert branches > 10
    assert len(texts) > 4


def test_one_token_is_drawn_per_token_emitted() -> None:
    rows: list[int] = []

    def sample(logits: torch.Tensor) -> torch.Tensor:
        rows.append(len(logits))
        return logits.argmax(dim=-1)

    generation = generate(make_target(), make_drafter(), prompt(9), NUM_NEW_TOKENS, sample=sample)

    assert rows == [1] * (1 + sum(num_accepted + 1 for num_accepted in generation.num_accepted))


def test_text_ends_with_the_first_end_of_sequence_token_inside_an_accepted_path() -> None:
    target, drafter, prompts = make_pair()
    cut = 0
    for input_ids in prompts[:2]:
        text = autoregressive(target, input_ids, NUM_NEW_TOKENS).token_ids
        for end in sorted(set(text)):
            eos_token_ids = {end, 1000}
            expected = text[: text.index(end) + 1]

            generation = generate(target, drafter, input_ids, NUM_NEW_TOKENS, eos_token_ids=eos_token_ids)

            assert generation.token_ids == expected
            control = autoregressive(target, input_ids, NUM_NEW_TOKENS, eos_token_ids=eos_token_ids)
            assert control.token_ids == expected
            drawn = 1 + sum(num_accepted + 1 for num_accepted in generation.num_accepted)
            cut += drawn > len(expected)
    assert cut > 5


def test_text_has_the_length_wanted_where_it_ends_inside_an_accepted_path() -> None:
    target, drafter, prompts = make_pair()
    text = autoregressive(target, prompts[0], 25).token_ids
    cut = 0
    for max_new_tokens in range(1, 26):
        generation = generate(target, drafter, prompts[0], max_new_tokens)

        assert generation.token_ids == text[:max_new_tokens]
        cut += 1 + sum(num_accepted + 1 for num_accepted in generation.num_accepted) > max_new_tokens
    assert cut > 5


def random_tree(root: int, seed: int, vocab_size: int = VOCAB) -> TokenTree:
    """Return a tree of 20 nodes with branches at every depth."""
    generator = torch.Generator().manual_seed(seed)
    beams = torch.randint(vocab_size, (1, 9, 4), generator=generator)
    beams[:, 3:, 0] = beams[:, 2:3, 0]
    beams[:, 6:, 1] = beams[:, 5:6, 1]
    scores = -torch.arange(1.0, 5.0).expand(1, 9, 4)
    return token_tree.best_nodes(torch.tensor([root]), token_tree.merge(beams, scores), 20)


@pytest.mark.parametrize("name", TARGETS)
def test_a_tree_is_seen_as_its_paths_are_one_by_one(name: str) -> None:
    target, input_ids = make_target(name), prompt(13)
    tree = random_tree(root=3, seed=0)
    context = Target(target, 40, fused_layers=[0, 1])
    context.read(input_ids)

    seen = context.verify(tree)

    nodes = naive.prefixes(tree)
    assert len(nodes) == 21
    assert seen.hidden.shape == (21, 3 * HIDDEN)
    for i, prefix in enumerate(nodes):
        alone = Target(target, 40, fused_layers=[0, 1]).read(torch.cat((input_ids, torch.tensor([3, *prefix]))))
        # sums in another order
        torch.testing.assert_close(seen.hidden[i, :HIDDEN], alone.hidden[-1, :HIDDEN], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.logits[i], alone.logits[-1], rtol=1e-5, atol=1e-5)
        # before the final norm numbers are some ten times as large
        torch.testing.assert_close(seen.hidden[i, HIDDEN:], alone.hidden[-1, HIDDEN:], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_after_a_commit_the_cache_is_that_of_the_accepted_text(name: str) -> None:
    target, input_ids = make_target(name), prompt(13)
    tree = random_tree(root=3, seed=0)
    nodes = naive.prefixes(tree)
    for last in range(len(nodes)):
        path = [nodes.index(nodes[last][:i]) for i in range(len(nodes[last]) + 1)]
        context, alone = Target(target, 40), Target(target, 40)
        context.read(input_ids)
        context.verify(tree)

        context.commit(torch.tensor(path))

        alone.read(torch.cat((input_ids, torch.tensor([3, *nodes[last]]))))
        assert context.num_cached == alone.num_cached == 14 + len(nodes[last])
        for layer, expected in zip(context.cache.layers, alone.cache.layers, strict=True):
            torch.testing.assert_close(layer.keys, expected.keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(layer.values, expected.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma 2", "gpt2"])
def test_the_hidden_state_is_the_one_after_the_final_norm(name: str) -> None:
    target, input_ids = make_target(name), prompt(13)

    seen = Target(target, 40).read(input_ids)

    output = target(input_ids[None], output_hidden_states=True)
    torch.testing.assert_close(seen.hidden, output.hidden_states[-1][0])
    torch.testing.assert_close(seen.logits, output.logits[0])
    if name == "gemma 2":
        assert seen.logits.abs().max() <= 3


@pytest.mark.parametrize("draft_ids", [None, [0, 2, 3, 5, 7]])
@pytest.mark.parametrize("name", ["llama", "llama with tied embeddings"])
def test_a_drafter_without_a_head_is_lent_the_targets(name: str, draft_ids: list[int] | None) -> None:
    torch.manual_seed(0)
    target = make_target(name)
    size = None if draft_ids is None else len(draft_ids)
    drafter = ReDrafter(
        ReDrafterConfig(
            hidden_size=HIDDEN, vocab_size=VOCAB, exit_dim=HIDDEN, tie_lm_head=True, draft_vocab_size=size, top_k=4
        )
    )
    if draft_ids is not None:
        drafter.set_draft_vocabulary(torch.tensor(draft_ids))

    generation = generate(target, drafter, prompt(9), NUM_NEW_TOKENS, shape=BeamShape(8, 3), num_nodes=30)

    assert generation.token_ids == hugging_face_greedy(target, prompt(9), NUM_NEW_TOKENS)
    assert sum(generation.num_accepted) > 0


def test_a_bfloat16_target_takes_a_float32_drafter() -> None:
    torch.manual_seed(0)
    target = TARGETS["llama"]().eval().bfloat16()

    generation = generate(target, make_drafter(), prompt(9), 20, shape=BeamShape(8, 3), num_nodes=30)

    assert len(generation.token_ids) == 20
    assert sum(generation.num_accepted) > 0


@pytest.mark.parametrize("deepest", [1, 5])
def test_no_draft_stands_where_the_target_has_no_position(deepest: int) -> None:
    target, drafter = make_target("gpt2"), make_drafter()
    max_new_tokens = 64 - 20

    generation = generate(target, drafter, prompt(20), max_new_tokens, shape=BeamShape(8, deepest), num_nodes=30)

    assert generation.token_ids == hugging_face_greedy(target, prompt(20), max_new_tokens)


def test_shape_and_budget_are_the_drafters_own_by_default() -> None:
    target = make_target()
    drafter = ReDrafter(
        ReDrafterConfig(hidden_size=HIDDEN, vocab_size=VOCAB, beam_width=8, draft_length=5, num_speculative_tokens=30)
    )

    by_default = generate(target, drafter, prompt(9), NUM_NEW_TOKENS)

    assert by_default == generate(target, drafter, prompt(9), NUM_NEW_TOKENS, shape=BeamShape(8, 5), num_nodes=30)
    assert by_default != generate(target, drafter, prompt(9), NUM_NEW_TOKENS, shape=BeamShape(1, 5), num_nodes=30)


def test_the_targets_are_left_as_they_were() -> None:
    target = make_target()

    generate(target, make_drafter(), prompt(9), 5)

    assert not target.get_output_embeddings()._forward_pre_hooks


def sliding_mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=8))


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1))


def bart() -> PreTrainedModel:
    sizes = {"d_model": HIDDEN, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCAB, **sizes))


def bart_decoder() -> PreTrainedModel:
    return BartForCausalLM(BartConfig(vocab_size=VOCAB, d_model=HIDDEN, decoder_layers=1, decoder_ffn_dim=8))


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=1, n_head=4))


def flex_llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**GROUPED, attn_implementation="flex_attention"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (sliding_mistral, "attends to 8 tokens, but prompt and output have 19"),
        (mamba, "MambaForCausalLM is not supported"),
        (bart, "BartForConditionalGeneration is not supported"),
        (bart_decoder, "BartForCausalLM is not supported"),
        (bloom, "BloomForCausalLM is not supported"),
        (flex_llama, "'flex_attention' takes no tree mask"),
    ],
)
def test_a_target_that_cannot_verify_trees_is_refused(build: Callable[[], PreTrainedModel], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        generate(build(), make_drafter(), prompt(9), 10)


def test_a_window_that_just_holds_the_text_is_enough() -> None:
    torch.manual_seed(0)
    target = MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=9 + NUM_NEW_TOKENS)).eval()

    generation = generate(target, make_drafter(), prompt(9), NUM_NEW_TOKENS, shape=BeamShape(8, 5), num_nodes=30)

    assert generation.token_ids == hugging_face_greedy(target, prompt(9), NUM_NEW_TOKENS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(0, dtype=torch.int64)}, "at least 1 token"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.int64)}, r"\(2, 3\), but it must be one prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_nodes": 64}, "64, but it must lie between 1 and 63"),
        ({"num_nodes": 0}, "0, but it must lie between 1 and 63"),
        ({"shape": BeamShape(0, 3)}, "at least 1"),
        ({"drafter": ReDrafter(ReDrafterConfig(hidden_size=HIDDEN, vocab_size=VOCAB + 1))}, "trained for this target"),
        ({"drafter": ReDrafter(ReDrafterConfig(hidden_size=16, vocab_size=VOCAB))}, "trained for this target"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    good = {"target": make_target(), "drafter": make_drafter(), "input_ids": prompt(9), "max_new_tokens": 10}

    with pytest.raises(ValueError, match=message):
        generate(**{**good, **arguments})


def test_an_accepted_length_is_the_mean_of_tokens_per_verification() -> None:
    generation = Generation([1, 2, 3, 4, 5, 6], [[1, 2], [], [3]])

    assert generation.num_steps == 3
    assert generation.num_accepted == [2, 0, 1]
    assert generation.mean_acceptance_length == 2.0
    assert Generation([1], []).mean_acceptance_length == 1.0
