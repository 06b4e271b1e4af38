"""What input rules with a field ``join`` have in common: both predictions are made into one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import one_of
from tta.core.component import Context
from tta.core.input_rule import Input
from tta.parts.join import FUSIONS, JOINS, fuse, join

__all__ = ["JoinedInput", "check_join"]


def check_join(rule: str | None) -> None:
    """Refuse a value of the field that is no rule."""
    if rule is not None:
        one_of("join", rule, (*JOINS, *FUSIONS))


class JoinedInput(Input):
    """An input rule whose config has ``join``: None, or a rule of :mod:`tta.parts.join`."""

    def __init__(self, config: Any, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        if config.join is not None:
            self.joins = "images" if config.join in FUSIONS else "logits"

    def join(self, logits: Tensor, other: Tensor) -> Tensor:
        """As the field ``join`` says."""
        return join(logits, other, self.config.join)

    def fuse(self, images: Tensor, others: Tensor, logits: Tensor, other: Tensor) -> Tensor:
        """As the field ``join`` says."""
        return fuse(images, others, logits, other, self.config.join)
