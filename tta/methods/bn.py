"""Prediction-time batch normalisation: the statistics of the current batch.

Nado et al.: Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift,
2020, arXiv 2006.10963. Schneider et al.: Improving Robustness against Common Corruptions by
Covariate Shift Adaptation, NeurIPS 2020, arXiv 2006.16971.

A corruption shifts the mean and scale of every channel; taking both from the test batch undoes
that, with nothing learned and nothing remembered. It wants large batches of one domain with mixed
classes, and fails on label-sorted streams, where the batch statistics carry the label.

    y = (x - mean_B(x)) / sqrt(var_B(x) + eps) * gamma + beta   (biased variance, over B, H, W)

Differences: the TENT repository overwrites every layer's eps with 1e-5, which changes models
whose eps differs; here the layer's own eps stays, and ``official=True`` overwrites it. Running
statistics are neither read nor updated, except that a batch of one is normalised with them, unless
``single_image="batch"`` asks for the statistics over its own places. An image that an update has
chosen alone out of a larger batch has its own statistics, as in the authors' code of such updates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.batch_split import current_split
from tta.core.checks import one_of
from tta.core.config import ComponentConfig
from tta.core.norm_layers import (
    batch_stats,
    check_values,
    evaluate,
    normalize,
    one_value,
    too_few_values,
)
from tta.core.norm_rule import NormRule
from tta.core.registry import register
from tta.core.tracing import is_tracing, rows_of, source_if

__all__ = ["BatchNormRule", "BnConfig"]

OFFICIAL_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class BnConfig(ComponentConfig):
    """Fields of ``bn``."""

    official: bool = False  # every layer's eps becomes 1e-5
    single_image: str = "source"  # statistics of a batch of one: "source", or "batch", its own

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("single_image", self.single_image, ("source", "batch"))


@register("bn")
class BatchNormRule(NormRule):
    """Statistics of the batch at hand."""

    Config = BnConfig
    channelwise = True

    def forward(self, x: Tensor, base: Any) -> Tensor:
        """Normalise (B, C, ...) with its own statistics, or the source's for a batch of one."""
        own = self.config.single_image == "batch" or self.part_size < 1
        few = one_value if own else too_few_values
        if few(x) and base.running_mean is not None:
            self.fell_back = True
            return normalize(x, base.running_mean, base.running_var, base)
        check_values(x)
        eps = OFFICIAL_EPS if self.config.official else base.eps
        if current_split() is not None:
            return normalize(x, *batch_stats(x), base, eps)
        if is_tracing():
            mean, var = batch_stats(x)
            if base.running_mean is not None:
                values = 1 if few is too_few_values else math.prod(x.shape[2:])
                mean, var = source_if(rows_of(x) * values < 2, mean, var, base, eps)
            return normalize(x, mean, var, base, eps)
        if not torch.is_grad_enabled() and x.device.type == "cpu" and x.ndim > 2:
            # Statistics, then the evaluation kernel: faster on a CPU than the training kernel.
            mean, var = batch_stats(x)
            return evaluate(x, mean, var, base, eps)
        # The fused training kernel, without buffers to update.
        return F.batch_norm(x, None, None, base.weight, base.bias, True, 0.0, eps)
