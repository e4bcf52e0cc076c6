"""How much is drafted and verified."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_port.beam_search import BeamShape
from mlx_port.config import check_num_nodes
from mlx_port.drafter import ReDrafter
from mlx_port.tree_forward import Mode


@dataclass(frozen=True)
class Plan:
    """How much is drafted and verified."""

    shape: BeamShape
    """Beams to search."""
    num_nodes: int
    """Most tree nodes verified per step, 1..63."""

    @classmethod
    def of(
        cls,
        drafter: ReDrafter,
        mode: Mode,
        beam_width: int | None = None,
        draft_length: int | None = None,
        tree_budget: int | None = None,
    ) -> Plan:
        """Return the drafter's own plan, or what was asked for; a target of chains gets chains.

        Raises:
            ValueError: a number is out of range.
        """
        config = drafter.config
        shape = BeamShape(
            config.beam_width if beam_width is None else beam_width,
            config.draft_length if draft_length is None else draft_length,
        )
        for name, value in (("beam width", shape.width), ("draft length", shape.length)):
            if value < 1:
                raise ValueError(f"the {name} is {value}, but it must be 1 or more")
        num_nodes = config.num_speculative_tokens if tree_budget is None else tree_budget
        check_num_nodes(num_nodes)
        return cls(BeamShape(1, shape.length) if mode.takes_chains_only else shape, num_nodes)

    @property
    def num_candidates(self) -> int:
        """Candidates kept per depth: a width of 1 asks for a chain, with more the runners-up count too."""
        return self.num_nodes if self.shape.width > 1 else 1
