"""The frozen target: its last hidden states and embeddings along a batch, and its distribution from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from vllm_redrafter.core import layers
from vllm_redrafter.training.batch import Batch

_PROBE_LENGTH = 16
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of logits that rounding explains, relative to the largest logit."""


class TargetView(NamedTuple):
    """What a drafter is trained from; all of it without gradient."""

    hidden: torch.Tensor  # [sequences, length, input_size]: what its head reads, then what left the fused layers
    embeddings: torch.Tensor  # [sequences, length, hidden_size]: rows of the table, without any scaling


class FrozenTarget:
    """A causal LM of Hugging Face that is only read: eval mode, no gradients."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        config = model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.num_layers: int = config.num_hidden_layers
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self._decoder: Any = model.base_model
        head: Any = model.get_output_embeddings()
        embedding: Any = model.get_input_embeddings()
        self._head = head
        self._embedding = embedding
        stops = model.generation_config.eos_token_id if model.generation_config else config.eos_token_id
        self.stop_token_ids: list[int] = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
        self._soft_cap: float | None = getattr(config, "final_logit_softcapping", None)

    @property
    def head_weight(self) -> torch.Tensor:
        """The head's rows, [vocab_size, hidden_size]."""
        weight: torch.Tensor = self._head.weight
        return weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head_weight.device

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self.model.to(device)

    @torch.no_grad()
    def read(self, batch: Batch, fused_layers: Sequence[int] | None = None) -> TargetView:
        """Return the target's view of packed documents, none of which sees another."""
        hidden = self._hidden(fused_layers, input_ids=batch.token_ids, position_ids=batch.position_ids)
        return TargetView(hidden, self.embed(batch.token_ids))

    @torch.no_grad()
    def hidden(
        self,
        token_ids: torch.Tensor,  # [length]
        fused_layers: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the last hidden states along one text, and behind each what left the layers, [length, input_size]."""
        return self._hidden(fused_layers, input_ids=token_ids[None])[0]

    def _hidden(self, fused_layers: Sequence[int] | None, **inputs: torch.Tensor) -> torch.Tensor:
        with layers.outputs_of(self.model, fused_layers) as outputs:
            last: torch.Tensor = self._decoder(**inputs, use_cache=False).last_hidden_state
        return torch.cat((last, *outputs), dim=-1) if outputs else last

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:  # [...] -> [..., hidden_size]
        """Return the rows of the embedding table: some models scale what they read from it, drafters do not."""
        return functional.embedding(token_ids, self._embedding.weight)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., hidden_size] -> [..., vocab_size]
        """Return the target's scores of the next token; where there is no soft cap, in its head's precision."""
        logits: torch.Tensor = self._head(hidden.to(self.head_weight.dtype))
        if self._soft_cap is not None:
            logits = self._soft_cap * torch.tanh(logits.float() / self._soft_cap)
        return logits

    @torch.no_grad()
    def check_head(self) -> None:
        """See on a few tokens that `logits` are the target's own distribution.

        Raises:
            NotImplementedError: its logits are not its head's product with the last hidden state (and a soft cap).
        """
        length = min(_PROBE_LENGTH, self.vocab_size)
        token_ids = torch.arange(length, device=self.head_weight.device)[None]
        expected = self.model(input_ids=token_ids, use_cache=False).logits.float()
        found = self.logits(self._decoder(input_ids=token_ids, use_cache=False).last_hidden_state).float()
        tolerance = _TOLERANCE[self.head_weight.dtype] * float(expected.abs().max())
        if not torch.allclose(found, expected, rtol=0, atol=tolerance):
            raise NotImplementedError(
                f"{type(self.model).__name__} does more to its logits than its head's product with the last hidden "
                "state: a drafter's teacher cannot be computed from that state; use --loss ce on text of the target"
            )
