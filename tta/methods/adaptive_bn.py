"""Adaptive batch normalisation: how much of the batch goes into the statistics, by what it shows.

Ours, from known parts: statistics that move (RoTTA's RobustBN, arXiv 2303.13899), and shrinkage
towards a known value (James and Stein, 1961).

Batch statistics are right for large batches in random order, moving averages for small ones and for
streams whose classes come in runs, and the source's for images like the source's. Nobody says which
stream it is, so each is found out:

    a = 1 - (1 - 1/N)^B,   mu <- (1 - a) mu + a mu_batch,   and the same for the variance
    d = mean_c (mu - mu_S)_c^2 / var_S,c,   e = mean_c v_c / var_S,c / n
    used: mu_S + k (mu - mu_S),   k = max(0, 1 - t e / d)

N is ``horizon`` images, or ``horizon_runs`` where an output rule that watches labels
(``persistence``) sees them come in runs. d is how far the averages are from the source's, e how far
they would be by chance: v is the variance of the images' means, n how many images the averages are
of (1/n <- (1 - a)^2 / n + a^2 / B, from 0 on), and t ``tolerance``. Variances are drawn in by the
same k. An image that equals the one before, as from a camera that hangs, counts for nothing. Images
that lie far outside are left out as in ``robust_bn``, and so are layers of next to no variance; the
others of such a network go a fifth of the way that k says, since more breaks it (decision 20).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta.core.checks import LARGE, LARGEST, boolean, number, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.norm_layers import (
    normalize,
    one_value,
    ordinary_images,
    pooled_stats,
)
from tta.core.registry import register
from tta.core.tracing import is_tracing, rows_before, rows_of
from tta.methods._moving_statistics import MovingStatistics, all_instance_stats

__all__ = ["AdaptiveBn", "AdaptiveBnConfig"]

STILL = 1e-9  # squared move of the means, in variances, of an image that is the one before
RUNS = 0.02  # persistence of labels from which they count as coming in runs


@dataclass(frozen=True, kw_only=True)
class AdaptiveBnConfig(ComponentConfig):
    """Fields of ``adaptive_bn``."""

    horizon: int = 24  # N, images that the averages reach back
    horizon_runs: int = 1280  # N where labels come in runs
    tolerance: float = 1.0  # t, how often chance must be exceeded
    official: bool = False  # without the rules for bad images and narrow layers

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("horizon", self.horizon, 1, LARGEST)
        whole_number("horizon_runs", self.horizon_runs, 1, LARGEST)
        number("tolerance", self.tolerance, 0, LARGE)
        boolean("official", self.official)


@register("adaptive_bn")
class AdaptiveBn(MovingStatistics):
    """Statistics of the batch, of an average or of the source, as the stream asks."""

    Config = AdaptiveBnConfig
    writable = False

    spread: Tensor  # (C,), v
    chance: Tensor  # 0-dimensional, 1 / n; 0 before the first batch
    last: Tensor  # (C,), means of the last image
    source_mean: Tensor  # (C,)
    source_var: Tensor  # (C,)

    def __init__(self, config: AdaptiveBnConfig, base: Any, context: Context) -> None:
        super().__init__(config, base, context)
        self.signs = context.signs
        self.register_buffer("spread", torch.zeros_like(self.mean))
        self.register_buffer("chance", torch.zeros((), dtype=self.mean.dtype))
        self.register_buffer("last", torch.zeros_like(self.mean))
        self.register_buffer("source_mean", self.mean.clone(), persistent=False)
        self.register_buffer("source_var", self.var.clone(), persistent=False)

    def forward(self, x: Tensor, base: Any) -> Tensor:
        """Move the averages towards (B, C, ...), unless frozen, and normalise it with a share."""
        mean, var = self.mean, self.var
        self.fell_back = self.fell_back or one_value(x)
        if self.learning and not self.fixed and not one_value(x):
            mean, var = self._moved(x, base)
        share = self.way * self.share(base.eps)
        mean = self.source_mean + share * (mean - self.source_mean)
        return normalize(x, mean, self.source_var + share * (var - self.source_var), base)

    def mixed_images(self, count: int) -> float:
        """Those of the longer average, as the rule sees runs of labels itself."""
        return float(self.config.horizon_runs)

    @torch.no_grad()
    def share(self, eps: float) -> Tensor:
        """k, the share of the way from the source's statistics to the averages, 0 to 1."""
        scale = self.source_var + eps
        far = ((self.mean - self.source_mean).square() / scale).mean()
        chance = self.config.tolerance * self.chance * (self.spread / scale).mean()
        return (1 - chance / far.clamp_min(torch.finfo(far.dtype).tiny)).clamp_min(0)

    def _horizon(self) -> int | Tensor:
        runs, c = self.signs.persistence > RUNS, self.config
        if isinstance(runs, Tensor):  # in a graph
            return torch.where(runs, c.horizon_runs, c.horizon)
        return c.horizon_runs if runs else c.horizon

    def _moved(self, x: Tensor, base: Any) -> tuple[Tensor, Tensor]:
        """Averages (C,) after (B, C, ...), with a graph; the buffers take their values over."""
        horizon = self._horizon()
        means, variances = all_instance_stats(x)
        with torch.no_grad():
            moves = (means - rows_before(self.last, means)).square() / (self.source_var + base.eps)
            kept = (moves.mean(1) > STILL) | (self.chance == 0)  # 0 before the first image
        if not self.config.official:
            kept = kept & ordinary_images(means, variances, self.mean, self.var, base)
        several = None
        if is_tracing() and math.prod(x.shape[2:]) == 1:  # one image may be one value
            several = rows_of(x) > 1
            kept = kept & several
        mean, var = pooled_stats(means, variances, kept)
        count = kept.sum()
        a = 1 - (1 - 1 / horizon) ** count
        mean, var = self.mean + a * (mean - self.mean), self.var + a * (var - self.var)
        with torch.no_grad():
            # Finite pixels may overflow; such a batch would spoil the averages for good.
            fine = mean.isfinite() & var.isfinite()
            self.mean.copy_(torch.where(fine, mean, self.mean))
            self.var.copy_(torch.where(fine, var, self.var))
            away = torch.where(kept[:, None], (means - self.mean).square(), 0.0).sum(0)
            moved = a * (away / count.clamp_min(1) - self.spread)
            self.spread += torch.where(fine, moved, 0.0)
            seen = fine if several is None else fine & several
            self.last.copy_(torch.where(seen, means[-1], self.last))
            self.chance.copy_((1 - a) ** 2 * self.chance + a**2 / count.clamp_min(1))
        return mean, var
