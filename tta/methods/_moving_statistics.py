"""What RobustBN and BN-EMA share: statistics that move with every batch, from the source's on.

The rules for bad images and narrow layers are those that :mod:`tta.methods.rotta` describes.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.batch_split import current_split
from tta.core.component import Context
from tta.core.norm_layers import (
    batch_stats,
    far_outside,
    instance_stats,
    is_narrow,
    normalize,
    one_value,
    pooled_stats,
)
from tta.core.norm_rule import NormRule

__all__ = ["MovingStatistics", "all_instance_stats"]


class MovingStatistics(NormRule):
    """Moving averages of the statistics of batches, starting from the source's.

    A subclass defines :attr:`rate`.

    Args:
        config: The component's config, with ``official``.
        base: The BatchNorm layer of the model.
        context: What is known at wrap.
    """

    needs_source_stats = True
    writable = True
    unbiased: ClassVar[bool] = False  # whether the averaged variance is

    mean: Tensor  # (C,)
    var: Tensor  # (C,)

    def __init__(self, config: Any, base: Any, context: Context) -> None:
        super().__init__(config, base, context)
        # At least float32, since half precision would round small moves of an average away.
        wide = torch.promote_types(base.running_mean.dtype, torch.float32)
        self.register_buffer("mean", base.running_mean.detach().to(wide, copy=True))
        self.register_buffer("var", base.running_var.detach().to(wide, copy=True))
        self.fixed = not config.official and is_narrow(base)

    @property
    def rate(self) -> float:
        """Share of the batch in the new statistics."""
        raise NotImplementedError  # pragma: no cover

    @torch.no_grad()
    def write_to(self, base: Any) -> None:
        """Write the averages into the layer's running statistics."""
        base.running_mean.copy_(self.mean)
        base.running_var.copy_(self.var)

    def forward(self, x: Tensor, base: Any) -> Tensor:
        """Move the averages towards (B, C, ...), unless frozen, and normalise it with them."""
        alone = one_value(x)
        self.fell_back = self.fell_back or alone
        if alone or self.fixed or not self.learning:
            return normalize(x, self.mean, self.var, base)
        return normalize(x, *self.moved(x, base), base)

    def moved(self, x: Tensor, base: Any) -> tuple[Tensor, Tensor]:
        """Mean and variance (C,) after (B, C, ...), with a graph, which the averages take over."""
        a = self.rate if self.part_size == 1 else 1 - (1 - self.rate) ** self.part_size
        if self.config.official:
            mean, var, enough = *batch_stats(x, self.unbiased), None
        else:
            mean, var, enough = self._ordinary_stats(x, base)
        mean, var = (1 - a) * self.mean + a * mean, (1 - a) * self.var + a * var
        if enough is not None:
            mean, var = torch.where(enough, mean, self.mean), torch.where(enough, var, self.var)
        with torch.no_grad():
            # Finite pixels may overflow; such a batch would spoil the averages for good.
            fine = mean.isfinite() & var.isfinite()
            self.mean.copy_(torch.where(fine, mean, self.mean))
            self.var.copy_(torch.where(fine, var, self.var))
        return mean, var

    def _ordinary_stats(self, x: Tensor, base: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Batch statistics without bad images, and whether more than one value is left for each."""
        means, variances = all_instance_stats(x)
        with torch.no_grad():
            kept = self._ordinary(means, variances, base)
            count = kept.sum() * math.prod(x.shape[2:])
        mean, var = pooled_stats(means, variances, kept)
        if self.unbiased:
            var = var * (count / (count - 1).clamp_min(1))
        return mean, var, count > 1

    @torch.no_grad()
    def _ordinary(self, means: Tensor, variances: Tensor, base: Any) -> Tensor:
        """Which images (B,) do not lie far outside, by their statistics (B, C)."""
        reference = torch.maximum(self.var, base.running_var) + base.eps
        return ~far_outside(means, variances, self.mean, reference)


def all_instance_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`instance_stats`, of the images of all ranks where the batch is split."""
    means, variances = instance_stats(x)
    if (split := current_split()) is not None:
        means, variances = split.gather(means), split.gather(variances)
    return means, variances
