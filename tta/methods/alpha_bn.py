"""alpha-BN: a fixed mixture of source and batch statistics.

You, Li, Zhao: Test-time Batch Statistics Calibration for Covariate Shift, 2021, arXiv 2110.04065.
No official code was found; this follows the most widely used public implementation, and what it
does beyond the abstract is not verified against the paper.

Batch statistics undo a covariate shift but also wash out what the source statistics say about the
class structure; mixing the two keeps some of both and works down to a batch of one.

    mean = w * mean_source + (1 - w) * mean_batch,   var = w * var_source + (1 - w) * var_batch

with w = ``source_weight``. Papers and repositories disagree on which side alpha multiplies: 1 is
the source model here, 0 batch statistics. The batch variance is the unbiased one, as in the public
code (``unbiased=False`` gives the biased one), and variances are mixed, not standard deviations.
Gradients flow through the batch part; ``official=True`` treats the mixture as a constant, as that
code does. BatchNorm1d and 3d are mixed too, where that code changes BatchNorm2d alone. The paper's
Core loss is not part of this rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta.core.checks import boolean, fraction
from tta.core.config import ComponentConfig
from tta.core.norm_layers import batch_stats, normalize, one_value
from tta.core.norm_rule import NormRule
from tta.core.registry import register
from tta.core.tracing import is_tracing, rows_of, source_if

__all__ = ["AlphaBn", "AlphaBnConfig"]


@dataclass(frozen=True, kw_only=True)
class AlphaBnConfig(ComponentConfig):
    """Fields of ``alpha_bn``."""

    source_weight: float = 0.9  # w; 1 = source model, 0 = batch statistics
    unbiased: bool = True  # batch variance with n - 1, as the public code
    official: bool = False  # no gradient through the statistics

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("source_weight", self.source_weight)
        boolean("unbiased", self.unbiased)
        boolean("official", self.official)


@register("alpha_bn")
class AlphaBn(NormRule):
    """Source and batch statistics, mixed."""

    Config = AlphaBnConfig
    needs_source_stats = True
    channelwise = True

    def mixed_images(self, count: int) -> float:
        """Those of a batch that errs as much as the mixture, of which the source's share rests."""
        rest = (1 - self.config.source_weight) ** 2
        return count / rest if rest > 0 else math.inf

    def forward(self, x: Tensor, base: Any) -> Tensor:
        """Normalise (B, C, ...) with the mixture; with one value per channel, with the source's."""
        if one_value(x):
            self.fell_back = True
            return normalize(x, base.running_mean, base.running_var, base)
        mean, var = batch_stats(x, self.config.unbiased)
        if self.config.official:
            mean, var = mean.detach(), var.detach()
        if is_tracing():
            mean, var = source_if(rows_of(x) * math.prod(x.shape[2:]) < 2, mean, var, base)
        w = self.config.source_weight
        mean = torch.add(w * base.running_mean, mean, alpha=1 - w)
        var = torch.add(w * base.running_var, var, alpha=1 - w)
        return normalize(x, mean, var, base)
