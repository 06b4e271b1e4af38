"""NOTE: instance-aware BatchNorm, and learning from a reservoir balanced over predictions.

Gong, Jeong, Kim, Kim, Shin, Lee: NOTE: Robust Continual Test-time Adaptation Against Temporal
Correlation, NeurIPS 2022, arXiv 2208.05117.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta.core.checks import LARGE, fraction, number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.norm_layers import batch_stats, one_value, too_few_values
from tta.core.norm_rule import NormRule
from tta.core.registry import register
from tta.parts.statistics import instance_aware

__all__ = ["Iabn", "IabnConfig"]


@dataclass(frozen=True, kw_only=True)
class IabnConfig(ComponentConfig):
    """Fields of ``iabn``."""

    alpha: float = 4.0  # k, standard errors by which an image may be off by chance
    learned_statistics: bool = True  # of the source and what was learned; False = of the batch
    momentum: float = 0.01  # share of a learning pass in the statistics

    def __post_init__(self) -> None:
        super().__post_init__()
        number("alpha", self.alpha, 0, LARGE)
        fraction("momentum", self.momentum)


@register("iabn")
class Iabn(NormRule):
    """Statistics of each image, as far as they differ from the source's by more than chance."""

    Config = IabnConfig
    needs_source_stats = True
    learns_apart = True

    mean: Tensor  # (C,)
    var: Tensor  # (C,), unbiased

    def __init__(self, config: IabnConfig, base: Any, context: Context) -> None:
        super().__init__(config, base, context)
        # At least float32, since half precision would round small moves of an average away.
        wide = torch.promote_types(base.running_mean.dtype, torch.float32)
        self.register_buffer("mean", base.running_mean.detach().to(wide, copy=True))
        self.register_buffer("var", base.running_var.detach().to(wide, copy=True))

    def forward(self, x: Tensor, base: Any) -> Tensor:
        """Normalise (B, C, ...) by statistics that are at rest, or by the batch's."""
        if self.config.learned_statistics:
            return self._normalised(x, self.mean, self.var, base)
        if too_few_values(x):
            self.fell_back = True
            return self._normalised(x, self.mean, self.var, base)
        return self._normalised(x, *batch_stats(x, unbiased=True), base)

    def learn(self, x: Tensor, base: Any) -> Tensor:
        """Normalise (B, C, ...) by the batch's statistics, towards which those at rest move."""
        if one_value(x):
            self.fell_back = True
            return self._normalised(x, self.mean, self.var, base)
        mean, var = batch_stats(x, unbiased=True)
        if self.config.learned_statistics:
            with torch.no_grad():
                # Finite pixels may overflow; such a batch would spoil the averages for good.
                fine = mean.isfinite() & var.isfinite()
                for average, value in ((self.mean, mean), (self.var, var)):
                    moved = average.lerp(value.to(average), self.config.momentum)
                    average.copy_(torch.where(fine, moved, average))
        return self._normalised(x, mean, var, base)

    def _normalised(self, x: Tensor, mean: Tensor, var: Tensor, base: Any) -> Tensor:
        alpha, eps = self.config.alpha, float(base.eps)
        return instance_aware(x, mean, var, base.weight, base.bias, alpha=alpha, eps=eps)
