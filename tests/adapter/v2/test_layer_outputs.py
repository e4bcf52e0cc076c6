from __future__ import annotations

import torch
from torch import nn

from vllm_redrafter.adapter.v2.layer_outputs import LayerOutputs

HIDDEN, MAX_TOKENS = 4, 6


class Target(nn.Module):
    """Hands out twice, thrice, ... what it is given, layer by layer, as vLLM's models do where layers are set."""

    layers: tuple[int, ...] = ()

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        self.layers = layers

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return -states, [(1 + layer) * states for layer in self.layers]


def outputs_of(target: Target, layers: tuple[int, ...]) -> LayerOutputs:
    return LayerOutputs(target, layers, MAX_TOKENS, HIDDEN, torch.float32, torch.device("cpu"))


def test_a_forward_returns_the_hidden_states_and_leaves_the_outputs_side_by_side() -> None:
    target, states = Target(), torch.randn(3, HIDDEN)
    outputs = outputs_of(target, (1, 4))

    hidden = target(states)

    assert target.layers == (1, 4)
    assert torch.equal(hidden, -states)
    assert torch.equal(outputs.rows[:3], torch.cat((2 * states, 5 * states), dim=-1))


def test_outputs_stay_where_they_are_and_rows_beyond_the_batch_untouched() -> None:
    target = Target()
    outputs = outputs_of(target, (2,))
    place = outputs.rows.data_ptr()
    target(torch.ones(MAX_TOKENS, HIDDEN))

    target(torch.zeros(2, HIDDEN))

    assert outputs.rows.data_ptr() == place
    assert outputs.rows[:, 0].tolist() == [0, 0, 3, 3, 3, 3]
