"""What RobustBN and BN-EMA share: statistics that move with every batch, from the source's on.

The rules for bad images and narrow layers are those that :mod:`tta.methods.rotta` describes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tta.core.batch_split import current_split
from tta.core.component import Context
from tta.core.narrow import is_narrow, part_of_way, share_of_way
from tta.core.norm_layers import (
    FAR_OUTSIDE,
    batch_stats,
    instance_stats,
    normalize,
    one_value,
    ordinary_images,
    pooled_stats,
    run_kernel,
)
from tta.core.norm_rule import NormRule
from tta.core.tracing import all_finite, is_tracing, look, look_after_refusal, refusal

__all__ = ["MovingStatistics", "all_instance_stats"]

NOTHING = 1e-12  # weight of an image that is left out beside those that are not


class _Ahead(NamedTuple):
    """What a graph computes of a layer's averages before it sees the images; each (C,)."""

    minus_mean: Tensor  # of the source's mean where the graph refuses the batch; also below
    var_of_nothing: Tensor  # the variance by the weight of an image that is left out
    rest_of_var: Tensor  # what stays of the variance
    limit: Tensor  # of the energy of ordinary images
    aside: Tensor | None = None  # what the source's mean adds to that of a narrow network
    source_var: Tensor | None = None  # what its variance adds


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
        self.way = share_of_way(context.narrow, config.official)
        self.ahead: _Ahead | None = None

    @classmethod
    def begin_graph(cls, layers: Sequence[tuple[Any, Any]]) -> None:
        """Compute of the averages of all layers at once what a graph needs before the images."""
        if cls.forward is not MovingStatistics.forward or cls.moved is not MovingStatistics.moved:
            return
        layers = [
            (r, b)
            for r, b in layers
            if r.learning and r.rate > 0 and not (r.fixed or r.config.official)
        ]
        if not layers:
            return
        rules, bases = zip(*layers, strict=True)
        source = [
            torch.cat([getattr(b, f"running_{key}") for b in bases]) for key in ("mean", "var")
        ]
        mean, var = (torch.cat([getattr(r, key) for r in rules]) for key in ("mean", "var"))
        eps = torch.cat([torch.full_like(r.var, b.eps) for r, b in layers])
        limit = FAR_OUTSIDE * (torch.maximum(var, source[1].to(var)) + eps)
        if (refused := refusal()) is not None:
            mean = torch.where(refused, source[0].to(mean), mean)
            var = torch.where(refused, source[1].to(var), var)
            limit = torch.where(refused, -1.0, limit)  # which no image is below
        sizes, rate = [len(r.var) for r in rules], rules[0].rate
        packed = (-mean, NOTHING * var, (1 - rate) * var, limit)
        if (rest := 1 - rules[0].way) > 0:
            packed += (rest * (source[0].to(mean) - mean), rest * source[1].to(var))
        for rule, *parts in zip(rules, *(v.split(sizes) for v in packed), strict=True):
            rule.ahead = _Ahead(*parts)

    def _in_graph(self, x: Tensor, base: Any, ahead: _Ahead) -> Tensor:
        """As :meth:`forward`, by few operations, whose number is what costs time on small layers.

        The layer is seen from the average's mean. An image's energy is then a mean of squares, and
        variances lose no digits without a pass over deviations from the image's own mean.
        """
        self.ahead = None  # a layer that is called again does so with averages that have moved
        rate, axes = self.rate, list(range(2, x.ndim))
        y = x + ahead.minus_mean.view(-1, *(1 for _ in axes))
        offsets, energies = y.mean(axes), (y * y).mean(axes)  # (B, C)
        ordinary = (energies <= ahead.limit).to(y.dtype).sum(1, keepdim=True)
        kept = ordinary >= 0.5 * x.shape[1]  # (B, 1)
        # Where no image is kept, all have the average's statistics, and count as one image each.
        total = torch.where(kept, 1 / rate, NOTHING / rate).sum()  # images, by the rate
        weight = total.reciprocal()
        shift = torch.where(kept, offsets, 0.0).sum(0) * weight
        energy = torch.where(kept, energies, ahead.var_of_nothing).sum(0) * weight
        spread = (energy - shift * shift * (1 / rate)).relu()  # times the rate
        if self.unbiased:
            values = total * (rate * math.prod(x.shape[2:]))
            spread = spread * torch.where(values > 1, values / (values - 1), 1.0)
        var = ahead.rest_of_var + spread
        self.mean.copy_(self.mean + shift)
        self.var.copy_(var)
        look_after_refusal()
        if ahead.aside is not None and ahead.source_var is not None:
            shift = ahead.aside + self.way * shift
            var = ahead.source_var + self.way * var
        return run_kernel(y, shift, var, base, base.eps)

    @property
    def rate(self) -> float:
        """Share of the batch in the new statistics."""
        raise NotImplementedError  # pragma: no cover

    def mixed_images(self, count: int) -> float:
        """Those of the batches that the averages go back over."""
        return count / self.rate if self.rate > 0 else math.inf

    @torch.no_grad()
    def write_to(self, base: Any) -> None:
        """Write the averages into the layer's running statistics."""
        mean, var = part_of_way(self.mean, self.var, base, self.way)
        base.running_mean.copy_(mean)
        base.running_var.copy_(var)

    def forward(self, x: Tensor, base: Any) -> Tensor:
        """Move the averages towards (B, C, ...), unless frozen, and normalise it with them."""
        alone = one_value(x)
        self.fell_back = self.fell_back or alone
        if alone or self.fixed or not self.learning:
            return self._used(x, self.mean, self.var, base)
        if self.ahead is not None and math.prod(x.shape[2:]) > 1:
            return self._in_graph(x, base, self.ahead)
        return self._used(x, *self.moved(x, base), base)

    def _used(self, x: Tensor, mean: Tensor, var: Tensor, base: Any) -> Tensor:
        """Normalise with averages, of which a narrow network takes a part."""
        return normalize(x, *part_of_way(mean, var, base, self.way), base)

    def moved(self, x: Tensor, base: Any) -> tuple[Tensor, Tensor]:
        """Mean and variance (C,) after (B, C, ...), with a graph, which the averages take over."""
        a = self.rate if self.part_size == 1 else 1 - (1 - self.rate) ** self.part_size
        if self.config.official:
            mean, var, enough = *batch_stats(x, self.unbiased), None
        else:
            mean, var, enough = self._ordinary_stats(x, base)
        mean, var = (1 - a) * self.mean + a * mean, (1 - a) * self.var + a * var
        if enough is not None and look(enough) is not True:
            mean, var = torch.where(enough, mean, self.mean), torch.where(enough, var, self.var)
        with torch.no_grad():
            if all_finite(mean, var):
                self.mean.copy_(mean)
                self.var.copy_(var)
            else:
                # Finite pixels may overflow; such a batch would spoil the averages for good.
                fine = mean.isfinite() & var.isfinite()
                self.mean.copy_(torch.where(fine, mean, self.mean))
                self.var.copy_(torch.where(fine, var, self.var))
        return mean, var

    def _ordinary_stats(self, x: Tensor, base: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Batch statistics without bad images, and whether more than one value is left for each.

        None says that they are.
        """
        means, variances = all_instance_stats(x)
        count = math.prod(x.shape[2:])
        with torch.no_grad():
            kept = ordinary_images(means, variances, self.mean, self.var, base)
            every = not is_tracing() and look(kept.all()) is True and len(means) * count > 1
            kept = None if every else kept
            values: Any = len(means) * count if kept is None else kept.sum() * count
        mean, var = pooled_stats(means, variances, kept)
        if kept is None:
            return mean, var * (values / (values - 1)) if self.unbiased else var, None
        if self.unbiased:
            var = var * (values / (values - 1).clamp_min(1))
        return mean, var, values > 1


def all_instance_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`instance_stats`, of the images of all ranks where the batch is split."""
    means, variances = instance_stats(x)
    if (split := current_split()) is not None:
        means, variances = split.gather(means), split.gather(variances)
    return means, variances
