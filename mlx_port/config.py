"""What a drafter is made of: sizes, draft vocabulary, and the beam shape that it drafts with by default."""

from __future__ import annotations

from dataclasses import dataclass

MAX_NODES = 63
"""Largest tree: the nodes' ancestor sets, the root included, fit one 64-bit word."""


@dataclass(frozen=True)
class ReDrafterConfig:
    """Configuration of a recurrent drafter (arXiv 2403.09919).

    Raises:
        ValueError: a number is out of range, or two of them contradict each other.
    """

    hidden_size: int
    """Width of the target's last hidden state, and of the recurrent state."""
    vocab_size: int
    """Rows of the target's token embedding and head."""
    exit_dim: int
    """Width of the residual blocks; there is an input projection where it is not `2 * hidden_size`."""
    num_draft_layers: int = 2
    """Residual blocks before the head."""
    rnn: bool = True
    """Whether the state is an RNN's; without it the state is the running sum of embeddings."""
    draft_vocab_size: int | None = None
    """Tokens that the head knows, a subset of the target's; None for all of them."""
    tie_lm_head: bool = False
    """Whether the head is the target's own; then `exit_dim` is `hidden_size`."""
    top_k: int | None = None
    """Candidates kept per beam before the softmax (Apple's models use 50); None keeps all."""
    beam_width: int = 4
    """Beams searched by default."""
    draft_length: int = 4
    """Tokens drafted per beam by default, the init token not counted."""
    num_speculative_tokens: int = 8
    """Tree nodes verified per step by default."""
    verifier: str | None = None
    """Name or path of the target that the drafter was trained for."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "exit_dim", "beam_width", "draft_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"drafter config: {name} is {getattr(self, name)}, but it must be 1 or more")
        if self.num_draft_layers < 0:
            raise ValueError(f"drafter config: num_draft_layers is {self.num_draft_layers}, but it must be 0 or more")
        check_num_nodes(self.num_speculative_tokens)
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"drafter config: draft_vocab_size is {self.draft_vocab_size}, "
                f"but it must lie between 1 and vocab_size ({self.vocab_size})"
            )
        if self.tie_lm_head and self.exit_dim != self.hidden_size:
            raise ValueError(
                f"drafter config: exit_dim is {self.exit_dim}, but a head tied to the target's needs "
                f"exit_dim == hidden_size ({self.hidden_size})"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"drafter config: top_k is {self.top_k}, but it must be 1 or more, or null to keep all")

    @property
    def head_size(self) -> int:
        """Number of tokens that the head scores."""
        return self.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size

    @property
    def has_input_proj(self) -> bool:
        """Whether `[context; state]` is projected before the residual blocks."""
        return self.exit_dim != 2 * self.hidden_size


def check_num_nodes(num_nodes: int) -> None:
    """Refuse a tree size outside 1..63.

    Raises:
        ValueError: with the rule and why it is there.
    """
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(
            f"the tree budget is {num_nodes}, but it must lie between 1 and {MAX_NODES}: "
            "a node's ancestors are kept in one 64-bit word"
        )
