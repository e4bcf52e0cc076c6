from __future__ import annotations

from vllm_redrafter.cli.generation import Answer, Generation, Prompt, join, merge, tokens_per_step


def answer(num_tokens: int, num_steps: int) -> Answer:
    return Answer("", [0] * num_tokens, num_steps, 1.0)


def test_tokens_per_step_leaves_out_the_step_that_reads_the_prompt() -> None:
    assert answer(9, 4).tokens_per_step == 2.0
    assert answer(1, 0).tokens_per_step is None
    # each step weighs the same, whatever answer it belongs to
    assert tokens_per_step([answer(9, 4), answer(1, 0), answer(3, 2)]) == 10 / 6


def test_a_conversation_as_text_begins_a_line_with_each_turn_of_the_user() -> None:
    said = [("user", "Once"), ("assistant", " upon a time."), ("user", "And then?")]

    assert join([{"role": role, "content": content} for role, content in said]) == "Once upon a time.\nAnd then?"


def test_merging_adds_up_time_and_counters_and_keeps_the_order() -> None:
    first, second = answer(2, 1), answer(3, 1)

    merged = merge([Generation([first], 1.0, {"a": 1}), Generation([second], 2.0, {"a": 2, "b": 3})])

    assert merged == Generation([first, second], 3.0, {"a": 3, "b": 3})
    assert merged.num_tokens == 5


def test_only_what_a_prompt_sets_is_sent() -> None:
    assert Prompt("", seed=0).as_dict() == {"text": "", "seed": 0}
    assert Prompt(messages=({"role": "user", "content": "a"},)).as_dict() == {
        "messages": ({"role": "user", "content": "a"},)
    }
