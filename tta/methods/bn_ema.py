"""BN-EMA: moving averages of the statistics of batches, as in training.

The method ``bnema`` of the benchmark that came with ROID (Marsden, Döbler, Yang, WACV 2024,
arXiv 2306.00650), which names no paper for it.

BatchNorm's running statistics go on moving at test time, from the source's on, with the momentum
and the unbiased variance of training. Nothing is trained. Batches may be small, since no batch
stands for the whole; what it takes is a stream that stays in a domain for some dozens of batches.

    m <- (1 - a) m + a mean_B(x),   v <- (1 - a) v + a var_B(x),   y = (x - m) / sqrt(v + eps) ...

Here each layer moves its averages and uses them at once, in one pass. The benchmark's code takes
two: in the first every layer normalises with the batch, so that deeper layers see what batch
statistics make of it, and the averages move; its result is dropped, and the second pass answers
with the averages as they are. ``official=True`` does that, at the price of a second forward pass,
except that dropout stays off in both. Each layer's own momentum is that of its training there,
0.1 in most networks; here it is the field ``momentum`` for all.

It differs from ``robust_bn`` in the rate and the unbiased variance, and leaves bad images out and
narrow layers alone by the same rules, which ``official=True`` turns off. A layer with one value for
each channel, as in a batch of one after pooling, is normalised with the averages as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tta.core.checks import boolean, fraction
from tta.core.config import ComponentConfig
from tta.core.norm_layers import batch_stats, normalize, one_value
from tta.core.registry import register
from tta.methods._moving_statistics import MovingStatistics

__all__ = ["BnEma", "BnEmaConfig"]


@dataclass(frozen=True, kw_only=True)
class BnEmaConfig(ComponentConfig):
    """Fields of ``bn_ema``."""

    momentum: float = 0.1  # a, weight of the new batch in every layer
    official: bool = False  # two passes, without the rules for bad images and narrow layers

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("momentum", self.momentum)
        boolean("official", self.official)


@register("bn_ema")
class BnEma(MovingStatistics):
    """Running statistics that go on moving as in training."""

    Config = BnEmaConfig
    unbiased = True

    @property
    def rate(self) -> float:
        """Weight a of the new batch."""
        return self.config.momentum

    @property
    def learns_first(self) -> bool:
        """Whether the averages move in a pass of their own, before the one that answers."""
        return self.config.official

    def learn(self, x: Tensor, base: Any) -> Tensor:
        """Move the averages towards (B, C, ...), and normalise it with its own statistics."""
        if one_value(x):
            self.fell_back = True
            return normalize(x, self.mean, self.var, base)
        self.moved(x, base)
        return normalize(x, *batch_stats(x), base)
