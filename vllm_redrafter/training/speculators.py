"""Our drafters inside the `speculators` library (0.9), which reads and saves our checkpoints once this is imported.

That is, its own `SpeculatorModelConfig.from_pretrained` and `SpeculatorModel.from_pretrained` do, and what they save is
what they read.

The library finds no classes but its own and has no entry point for others, so somebody has to import this module;
nothing else in this package does. Its command line imports nobody's and therefore does not know our drafters: they are
trained by `vllm-redrafter train`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NoReturn

import torch
from pydantic import Field
from speculators import SpeculatorModel, SpeculatorModelConfig, reload_schemas
from torch import nn

from vllm_redrafter.core import drafter, formats
from vllm_redrafter.core.config import ReDrafterConfig


@SpeculatorModelConfig.register(ReDrafterConfig.model_type)
class ReDrafterSpeculatorConfig(SpeculatorModelConfig):
    """The config of a drafter as the library holds it; the flat fields of `ReDrafterConfig` are attributes of it."""

    # without it the library copies this file into every checkpoint that it saves
    _auto_class: ClassVar[str | None] = None

    speculators_model_type: Literal["redrafter"] = "redrafter"
    architectures: list[str] = Field(default_factory=lambda: ["ReDrafter"])
    transformer_layer_config: dict[str, Any] = Field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as our own checkpoints have them, without the defaults that the library fills in."""
        fields: dict[str, Any] = super().to_dict()
        fields["model_type"] = ReDrafterConfig.model_type
        # set by every model of the library; ours have no embeddings to tie
        fields.pop("tie_word_embeddings", None)
        if self.speculators_config is not None:
            fields["speculators_config"] = self.speculators_config.model_dump(exclude_unset=True)
        return fields

    def _get_generation_parameters(self) -> dict[str, Any]:
        # transformers takes top_k for an option of text generation and refuses to save it here
        return {}

    def to_drafter_config(self) -> ReDrafterConfig:
        """Return the same configuration as the rest of this package holds it.

        Raises:
            ValueError: it does not describe a usable drafter.
        """
        return formats.parse_config(self.to_dict(), self.name_or_path or "the speculators config")


@SpeculatorModel.register(ReDrafterConfig.model_type)
class ReDrafter(SpeculatorModel):
    """A drafter as the library holds it: its tensors, under the names of our checkpoints.

    `to_drafter` gives the one that computes.
    """

    config_class = ReDrafterSpeculatorConfig

    def __init__(self, config: ReDrafterSpeculatorConfig) -> None:
        super().__init__(config)
        ours = drafter.ReDrafter(config.to_drafter_config())
        for name, module in ours.named_children():
            self.add_module(name, module)
        for name, buffer in ours.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        if ours.config.emb_norm:
            self.emb_norm = nn.RMSNorm(ours.config.hidden_size)
        self.post_init()

    def to_drafter(self) -> drafter.ReDrafter:
        """Return the drafter that computes; its tensors are this model's own."""
        with torch.device("meta"):
            ours = drafter.ReDrafter(self.config.to_drafter_config())
        state = self.state_dict()
        ours.load_state_dict({name: state[name] for name in ours.state_dict()}, assign=True)
        return ours

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a drafter needs the target's hidden states and embeddings, which the library does not hand over."""
        raise NotImplementedError("a ReDrafter drafter does not run by itself: call to_drafter() and use its methods")

    @classmethod
    def from_training_args(cls, verifier_config: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the library's trainer is made for drafters with transformer layers."""
        raise NotImplementedError("speculators does not train ReDrafter drafters: run `vllm-redrafter train`")

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> NoReturn:
        """Refuse, as `from_training_args` does."""
        raise NotImplementedError("speculators does not train ReDrafter drafters: run `vllm-redrafter train`")


# what has been registered counts for `from_pretrained` of the base classes only from here on
reload_schemas()
