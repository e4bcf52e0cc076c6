from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from mlx_port.beam_search import BeamShape
from mlx_port.decoding import generate_step
from mlx_port.plan import Plan
from mlx_port.target import Target
from mlx_port.tree_forward import Mode
from tests.mlx_port.tiny_models import (
    CONFIGS,
    PROMPT,
    alone,
    drafted,
    make_drafter,
    make_model,
    make_plan,
    make_target,
)

NUM_TOKENS = 40
PLANS = [(1, 1, 1), (1, 4, 4), (3, 2, 5), (4, 4, 8), (8, 5, 30), (45, 4, 63)]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_is_that_of_mlx_lm_for(name: str) -> None:
    target = make_target(name)

    token_ids, telemetry = drafted(target, PROMPT, NUM_TOKENS, plan=make_plan(4, 3, 15))

    assert token_ids == alone(target, PROMPT, NUM_TOKENS)
    assert telemetry.accepted_draft_token_count > 0
    assert len(set(token_ids)) > 2


@pytest.mark.parametrize("plan", PLANS)
def test_greedy_text_does_not_depend_on_the_plan(plan: tuple[int, int, int]) -> None:
    target = make_target()

    token_ids, telemetry = drafted(target, PROMPT, NUM_TOKENS, plan=make_plan(*plan))

    assert token_ids == alone(target, PROMPT, NUM_TOKENS)
    assert telemetry.draft_token_count >= telemetry.round_count * min(plan[1], plan[2])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_text_is_that_of_mlx_lm_with_quantised_weights(name: str, bits: int) -> None:
    target = make_target(name, bits)

    token_ids, telemetry = drafted(target, PROMPT, NUM_TOKENS, plan=make_plan(4, 3, 15))

    assert token_ids == alone(target, PROMPT, NUM_TOKENS)
    assert telemetry.accepted_draft_token_count > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("start", [0, 9, 20])
@pytest.mark.parametrize("bits", [4, 8])
def test_greedy_text_is_that_of_mlx_lm_with_a_quantised_cache(name: str, start: int, bits: int) -> None:
    target = make_target(name)
    options = {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": start}

    token_ids, telemetry = drafted(target, PROMPT, NUM_TOKENS, plan=make_plan(4, 3, 15), **options)

    assert token_ids == alone(target, PROMPT, NUM_TOKENS, **options)
    assert telemetry.accepted_draft_token_count > 0


@pytest.mark.parametrize("max_kv_size", [5, 8, 13, 30])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_greedy_text_is_that_of_mlx_lm_when_a_rotating_cache_wraps(name: str, max_kv_size: int) -> None:
    target = make_target(name)

    token_ids, telemetry = drafted(target, PROMPT, 60, plan=make_plan(4, 3, 15), max_kv_size=max_kv_size)

    assert token_ids == alone(target, PROMPT, 60, max_kv_size=max_kv_size)
    assert telemetry.accepted_draft_token_count > 0


@pytest.mark.parametrize("prefill_step_size", [1, 3, 512])
def test_a_prompt_may_be_read_in_pieces(prefill_step_size: int) -> None:
    target = make_target("mistral, window of 12")
    prompt = PROMPT * 5
    reports: list[tuple[int, int]] = []

    token_ids, _ = drafted(
        target,
        prompt,
        NUM_TOKENS,
        prefill_step_size=prefill_step_size,
        prompt_progress_callback=lambda done, total: reports.append((done, total)),
    )

    assert token_ids == alone(target, prompt, NUM_TOKENS, prefill_step_size=prefill_step_size)
    assert reports[0] == (0, 35)
    assert reports[-1] == (35, 35)


def test_a_prompt_of_one_token_is_enough() -> None:
    target = make_target()

    assert drafted(target, [4], NUM_TOKENS)[0] == alone(target, [4], NUM_TOKENS)


def test_log_probabilities_are_those_of_mlx_lm() -> None:
    from mlx_lm.generate import generate_step as stock

    target = make_target()

    ours = [row for _, row, _ in generate_step(mx.array(PROMPT), target, make_drafter(), max_tokens=20)]
    theirs = [row for _, row in stock(mx.array(PROMPT), target.model, max_tokens=20)]

    assert mx.array_equal(mx.stack(ours), mx.stack(theirs))


def test_a_token_is_marked_as_drafted_when_it_was_accepted() -> None:
    target = make_target()

    steps = list(generate_step(mx.array(PROMPT), target, make_drafter(), max_tokens=NUM_TOKENS))
    telemetry = drafted(target, PROMPT, NUM_TOKENS)[1]

    assert 0 < sum(from_draft for _, _, from_draft in steps) <= telemetry.accepted_draft_token_count
    assert steps[0][2] is False


def test_logits_processors_see_the_tokens_up_to_their_node() -> None:
    target = make_target()
    # mlx-lm 0.28 hides all of the prompt but its last token from the processors: there is only that one
    prompt = [4]

    def processors() -> list:
        return make_logits_processors(logit_bias={3: 1.0}, repetition_penalty=1.5, repetition_context_size=6)

    token_ids, telemetry = drafted(target, prompt, NUM_TOKENS, logits_processors=processors())

    assert token_ids == alone(target, prompt, NUM_TOKENS, logits_processors=processors())
    assert token_ids != alone(target, prompt, NUM_TOKENS)
    assert telemetry.accepted_draft_token_count > 0


@pytest.mark.parametrize("num_tokens", range(1, 12))
def test_max_tokens_may_fall_inside_an_accepted_path(num_tokens: int) -> None:
    target = make_target()

    assert drafted(target, PROMPT, num_tokens)[0] == alone(target, PROMPT, num_tokens)


QUANTISED = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 5}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("gemma3", {}),
        ("mistral, window of 12", {}),
        ("gpt2", {}),
        # mlx-lm does not quantise the rotating ones
        ("llama", QUANTISED),
        ("gpt2", QUANTISED),
    ],
)
def test_wherever_the_caller_stops_the_caches_have_read_what_was_yielded(name: str, options: dict) -> None:
    target = make_target(name)
    text = alone(target, PROMPT, NUM_TOKENS, **options)

    for count in range(1, 25):
        caches = make_prompt_cache(target.model)
        steps = generate_step(mx.array(PROMPT), target, make_drafter(), prompt_cache=caches, **options)
        for _ in range(count):
            next(steps)
        steps.close()

        assert {layer.offset for layer in caches} == {len(PROMPT) + count}
        # the next token is read by stock mlx-lm: it continues the text as if nothing had ever been drafted
        followed = alone(target, text[count : count + 1], 8, prompt_cache=caches, **options)
        assert followed == text[count + 1 : count + 9]


def test_max_tokens_leaves_the_caches_as_a_stop_does() -> None:
    target = make_target()
    caches = make_prompt_cache(target.model)
    text = alone(target, PROMPT, NUM_TOKENS)

    drafted(target, PROMPT, 17, prompt_cache=caches)

    assert alone(target, text[17:18], 8, prompt_cache=caches) == text[18:26]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_cache_is_saved_and_reloaded(name: str, tmp_path: Path) -> None:
    target = make_target(name)
    caches = make_prompt_cache(target.model)
    text = alone(target, PROMPT, NUM_TOKENS)
    drafted(target, PROMPT, 10, prompt_cache=caches)

    save_prompt_cache(str(tmp_path / "cache.safetensors"), caches)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))

    assert drafted(target, text[10:11], 20, prompt_cache=loaded)[0] == text[11:31]


def test_drafting_stops_at_the_last_position_of_the_target() -> None:
    target = copy.copy(make_target())
    target.max_length = len(PROMPT) + 10

    token_ids, telemetry = drafted(target, PROMPT, NUM_TOKENS)

    assert token_ids == alone(target, PROMPT, NUM_TOKENS)
    # behind the last position nothing is drafted: one token per forward
    assert telemetry.target_model_call_count - telemetry.round_count >= NUM_TOKENS - 10


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    target = make_target()

    with pytest.raises(
        ValueError, match=r"the prompt has 513 tokens, but the llama target's context holds 512: shorten"
    ):
        drafted(target, [1] * 513, 1)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least 1 token"),
        (PROMPT, {"max_tokens": 0}, "max_tokens is 0, but it must be 1 or more, or -1"),
        (PROMPT, {"prefill_step_size": 0}, "prefill_step_size is 0, but it must be 1 or more"),
    ],
)
def test_an_unusable_number_is_refused(prompt: list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(generate_step(mx.array(prompt), make_target(), make_drafter(), **options))


def test_a_rotating_cache_is_not_quantised() -> None:
    with pytest.raises(ValueError, match="kv_bits is 8, but mlx-lm does not quantise rotating caches"):
        drafted(make_target("gemma3"), PROMPT, 1, kv_bits=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree_budget": 64}, "the tree budget is 64, but it must lie between 1 and 63"),
        ({"tree_budget": 0}, "the tree budget is 0, but it must lie between 1 and 63"),
        ({"beam_width": 0}, "the beam width is 0, but it must be 1 or more"),
        ({"draft_length": 0}, "the draft length is 0, but it must be 1 or more"),
    ],
)
def test_an_unusable_plan_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.of(make_drafter(), Mode.TREE, **options)


def test_a_plan_is_the_drafters_own_unless_told_otherwise() -> None:
    drafter = make_drafter()

    assert Plan.of(drafter, Mode.TREE) == Plan(BeamShape(4, 4), 8)
    assert Plan.of(drafter, Mode.TREE, beam_width=2, tree_budget=5) == Plan(BeamShape(2, 4), 5)
    assert Plan.of(drafter, Mode.CHAIN) == Plan(BeamShape(1, 4), 8)


def test_the_search_is_compiled_once_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(make_model(CONFIGS["llama"]))
    compiled: list[object] = []
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.gpu))
    monkeypatch.setattr(mx, "compile", lambda function: compiled.append(function) or function)

    for _ in range(2):
        drafted(target, PROMPT, 10)

    assert len(compiled) == 1


@pytest.fixture
def num_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts what makes the host wait: `mx.eval`, and reading an array that no `mx.eval` has been given."""
    waits = [0]
    evaluated: set[int] = set()
    stock_eval = mx.eval

    def leaves(value: object) -> Iterator[mx.array]:
        if isinstance(value, mx.array):
            yield value
        elif isinstance(value, (list, tuple)):
            for part in value:
                yield from leaves(part)

    keep = []

    def count_eval(*arrays: object) -> None:
        waits[0] += 1
        keep.append(arrays)
        evaluated.update(id(array) for array in leaves(arrays))
        stock_eval(*arrays)

    monkeypatch.setattr(mx, "eval", count_eval)
    for name in ("tolist", "item", "__bool__", "__int__", "__float__"):
        stock = getattr(mx.array, name)

        def count_read(self: mx.array, stock=stock):
            waits[0] += id(self) not in evaluated
            return stock(self)

        monkeypatch.setattr(mx.array, name, count_read)
    return waits


@pytest.mark.parametrize("options", [{}, {"logits_processors": make_logits_processors(repetition_penalty=1.2)}])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_host_waits_once_per_step(name: str, options: dict, num_waits: list[int]) -> None:
    target = make_target(name)
    prompt = mx.array(PROMPT)
    plan = make_plan(4, 4, 15)
    num_waits[0] = 0

    _, telemetry = drafted(target, PROMPT, NUM_TOKENS, plan=plan, **options)

    # two more: the prompt's tokens are read, and its caches evaluated
    assert num_waits[0] == telemetry.target_model_call_count + 2
    assert prompt.size == len(PROMPT)
