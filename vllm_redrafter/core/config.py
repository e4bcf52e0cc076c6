"""What a drafter is made of: sizes, draft vocabulary, and the beam shape that it drafts with by default."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from transformers import PretrainedConfig

MAX_NODES = 63
"""Largest tree: the nodes' ancestor sets, the root included, fit one 64-bit word."""

_SPECULATORS_VERSION = "0.9.0"


class ReDrafterConfig(PretrainedConfig):
    """Configuration of a recurrent drafter (arXiv 2403.09919), stored as the `speculators` library stores its own.

    Args:
        hidden_size: width of the target's last hidden state, and of the recurrent state.
        vocab_size: number of rows of the target's token embedding and head.
        exit_dim: width of the residual blocks; an input projection is there when it is not `2 * hidden_size`.
        num_draft_layers: number of residual blocks before the head.
        rnn: whether the state is an RNN's; without it the state is the running sum of embeddings.
        draft_vocab_size: number of tokens the head knows, a subset of the target's; None for all of them.
        tie_lm_head: whether the head is the target's own; then `exit_dim` must equal `hidden_size`.
        top_k: candidates kept per beam before the softmax (Apple's models use 50); None keeps all.
        fused_layers: the target's decoder layers, from 0 and ascending, whose outputs the drafter sees besides the last
            hidden state; None for none, as in Apple's models.
        emb_norm: whether the checkpoint carries Apple's `emb_norm.weight`, which no forward pass has ever used.
        beam_width: beams searched by default.
        draft_length: tokens drafted per beam by default, the init token not counted.
        num_speculative_tokens: tree nodes verified per step by default.
        trained_draft_length: depth the drafter was trained for; drafting deeper is allowed and warned about.
        verifier: name or path of the target that it was trained for.
        verifier_architectures: that target's `architectures`.

    Raises:
        ValueError: a size is not positive, or two of them contradict each other.
    """

    model_type = "redrafter"

    def __init__(
        self,
        hidden_size: int = 0,
        vocab_size: int = 0,
        exit_dim: int | None = None,
        num_draft_layers: int = 2,
        rnn: bool = True,
        draft_vocab_size: int | None = None,
        tie_lm_head: bool = False,
        top_k: int | None = None,
        fused_layers: list[int] | None = None,
        emb_norm: bool = False,
        beam_width: int = 4,
        draft_length: int = 4,
        num_speculative_tokens: int = 8,
        trained_draft_length: int | None = None,
        verifier: str | None = None,
        verifier_architectures: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        for derived in (
            "speculators_model_type",
            "speculators_version",
            "speculators_config",
            "transformer_layer_config",
        ):
            kwargs.pop(derived, None)
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.exit_dim = 2 * hidden_size if exit_dim is None else exit_dim
        self.num_draft_layers = num_draft_layers
        self.rnn = rnn
        self.draft_vocab_size = draft_vocab_size
        self.tie_lm_head = tie_lm_head
        self.top_k = top_k
        self.fused_layers = fused_layers
        self.emb_norm = emb_norm
        self.beam_width = beam_width
        self.draft_length = draft_length
        self.num_speculative_tokens = num_speculative_tokens
        self.trained_draft_length = draft_length if trained_draft_length is None else trained_draft_length
        self.verifier = verifier
        self.verifier_architectures = list(verifier_architectures or [])

    @property
    def head_size(self) -> int:
        """Number of tokens that the head scores."""
        return self.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size

    @property
    def has_input_proj(self) -> bool:
        """Whether `[context; state]` is projected before the residual blocks."""
        return self.exit_dim != 2 * self.hidden_size

    @property
    def input_size(self) -> int:
        """Width of what the target hands over per token: its last hidden state, and the fused layers' outputs."""
        return (1 + len(self.fused_layers or ())) * self.hidden_size

    def check(self) -> None:
        """Refuse a configuration that no drafter can be built from.

        Raises:
            ValueError: naming the field, its value and the rule.
        """
        for name in ("hidden_size", "vocab_size", "exit_dim", "beam_width", "draft_length", "trained_draft_length"):
            value = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise ValueError(f"drafter config: {name} is {value!r}, but it must be a positive integer")
        if not _is_integer(self.num_draft_layers) or self.num_draft_layers < 0:
            raise ValueError(
                f"drafter config: num_draft_layers is {self.num_draft_layers!r}, but it must be an integer of 0 or more"
            )
        check_num_nodes(self.num_speculative_tokens)
        size = self.draft_vocab_size
        if size is not None and (not _is_integer(size) or not 1 <= size <= self.vocab_size):
            raise ValueError(
                f"drafter config: draft_vocab_size is {size!r}, "
                f"but it must be an integer between 1 and vocab_size ({self.vocab_size})"
            )
        if self.tie_lm_head and self.exit_dim != self.hidden_size:
            raise ValueError(
                f"drafter config: exit_dim is {self.exit_dim}, but a head tied to the target's needs "
                f"exit_dim == hidden_size ({self.hidden_size})"
            )
        if self.top_k is not None and (not _is_integer(self.top_k) or self.top_k < 1):
            raise ValueError(
                f"drafter config: top_k is {self.top_k!r}, but it must be a positive integer, or null to keep all"
            )
        if self.fused_layers is not None and not _is_ascending(self.fused_layers):
            raise ValueError(
                f"drafter config: fused_layers is {self.fused_layers!r}, but it must hold distinct layer indices of 0 "
                "or more in ascending order, or be null for none"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as written to `config.json`, with the blocks that `speculators` and vLLM look for."""
        fields: dict[str, Any] = super().to_dict()
        fields["speculators_model_type"] = self.model_type
        fields["speculators_version"] = _SPECULATORS_VERSION
        fields["speculators_config"] = {
            "algorithm": self.model_type,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": self.num_speculative_tokens}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": self.verifier, "architectures": self.verifier_architectures},
        }
        fields["transformer_layer_config"] = {"hidden_size": self.hidden_size, "vocab_size": self.vocab_size}
        return fields


def check_num_nodes(num_nodes: int) -> None:
    """Refuse a tree size outside 1..63.

    Raises:
        ValueError: with the rule and why it is there.
    """
    if not _is_integer(num_nodes) or not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(
            f"num_speculative_tokens is {num_nodes!r}, but it must lie between 1 and {MAX_NODES}: "
            "a node's ancestors are kept in one 64-bit word"
        )


def _is_ascending(layers: list[int]) -> bool:
    if not layers or not all(_is_integer(layer) and layer >= 0 for layer in layers):
        return False
    return all(layer < following for layer, following in pairwise(layers))


def _is_integer(value: object) -> bool:
    # to Python, True is an integer
    return isinstance(value, int) and not isinstance(value, bool)
