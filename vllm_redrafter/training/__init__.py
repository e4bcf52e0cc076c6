"""From text to a drafter: data, loss, trainer, evaluation and distillation."""

from __future__ import annotations
