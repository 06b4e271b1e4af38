"""Networks with BatchNorm layers of next to no variance, which bear little change of statistics.

Networks of depthwise convolutions lose channels in training, and do not average the statistics of
one channel with those of another. Statistics that lie between two domains break such a network,
though none has moved far (decision 20). The rules that let statistics move therefore go only
``NARROW_SHARE`` of the way in such a network, and those with averages leave narrow layers alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["is_narrow", "part_of_way", "share_of_way"]

NARROW = 1e-6  # share of a layer's median variance below which a channel is silent
NARROW_SHARE = 0.2  # of the way from the source's statistics, in networks with narrow layers


def is_narrow(base: Any) -> bool:
    """Whether the source model left channels of this BatchNorm layer without variance.

    It did where the smallest running variance is under ``NARROW`` times the layer's median.
    """
    variances = base.running_var
    return variances is not None and bool(variances.min() < NARROW * variances.median())


def share_of_way(narrow: bool, official: bool) -> float:
    """How far a rule goes from the source's statistics, of 1, in a network with narrow layers."""
    return NARROW_SHARE if narrow and not official else 1.0


def part_of_way(mean: Tensor, var: Tensor, base: Any, share: float) -> tuple[Tensor, Tensor]:
    """Go ``share`` of the way from the source's statistics (C,) to others, (C,) or (B, C)."""
    if share == 1:
        return mean, var
    source_mean, source_var = base.running_mean.to(mean), base.running_var.to(var)
    return source_mean.lerp(mean, share), source_var.lerp(var, share)
