"""What is overheard of a layer is what leaves it, in every architecture, and nobody listens afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.core.test_decoding import TARGETS, make_target, prompt
from vllm_redrafter.core.layers import find_layers, outputs_of


@torch.no_grad()
@pytest.mark.parametrize("name", TARGETS)
def test_what_leaves_a_layer_is_what_enters_the_next(name: str) -> None:
    target, input_ids = make_target(name), prompt(9)[None]

    with outputs_of(target, [0, 1]) as outputs:
        last = target(input_ids, output_hidden_states=True)

    # Hugging Face counts the embeddings as 0, and hands the last layer's output out behind the final norm only
    assert torch.equal(outputs[0], last.hidden_states[1])
    norm = next(child for child in target.base_model.children() if "norm" in type(child).__name__.lower())
    torch.testing.assert_close(norm(outputs[1]), last.hidden_states[2])


@torch.no_grad()
def test_nobody_listens_before_or_after() -> None:
    target, input_ids = make_target("llama"), prompt(9)[None]

    with outputs_of(target, None) as none, outputs_of(target, [1]) as outputs:
        target(input_ids)
    target(input_ids)

    assert none == []
    assert len(outputs) == 1


def test_layers_that_the_target_lacks_are_refused() -> None:
    message = "the layers 0, 2 are to be fused, but the target's are 0 to 1: choose from those, or use a drafter that"
    with pytest.raises(ValueError, match=message), outputs_of(make_target("llama"), [0, 2]):
        pass


def test_a_target_without_a_list_of_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target("llama")
    monkeypatch.setattr(target, "get_decoder", lambda: nn.Sequential(nn.Linear(2, 2)))

    with pytest.raises(NotImplementedError, match="no list of 2 layers was found in LlamaForCausalLM: use a drafter"):
        find_layers(target, [0])
