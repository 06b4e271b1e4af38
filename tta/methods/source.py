"""The source model without adaptation: the baseline of every comparison.

``tta.wrap(model, "source")`` predicts in eval mode with running statistics and learns nothing, so
that a baseline runs through the same code as the methods. In a slot, the name means "leave this
slot as the source model has it".
"""

from __future__ import annotations

from dataclasses import dataclass

from tta.core.component import Component
from tta.core.config import ComponentConfig
from tta.core.registry import register

__all__ = ["Source", "SourceConfig"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig(ComponentConfig):
    """``source`` has no fields."""


@register("source")
class Source(Component):
    """A name for empty slots; no object of this class is ever made."""

    Config = SourceConfig
    empties_slots = True
