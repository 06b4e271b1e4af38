"""The norm slot: where BatchNorm layers take their statistics from."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tta.core.component import Component, Context

__all__ = ["NormRule"]


class NormRule(Component):
    """Where one BatchNorm layer takes its statistics from; built once for every layer.

    A subclass writes :meth:`forward`, usually with :func:`tta.core.norm_layers.normalize`.
    ``learning`` is False while the adapter is frozen; ``fell_back`` is set when too few values came
    for batch statistics and the source statistics were used instead.
    """

    slot = "norm"
    needs_source_stats: ClassVar[bool] = False  # the layer must have running statistics

    def __init__(self, config: Any, base: Any, context: Context) -> None:
        super().__init__(config)
        self.learning = True
        self.fell_back = False

    def forward(self, x: Tensor, base: Any) -> Tensor:
        """Normalise ``x`` (B, C, ...) with this rule's statistics and the base's affine part."""
        raise NotImplementedError  # pragma: no cover
