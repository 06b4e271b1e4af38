"""Normalisation by statistics that depend on the images, with gradients in few passes over memory.

What autograd makes of single operations goes nine times over a tensor of the size of the layer's
images; its arithmetic is next to nothing, so that these passes are what it costs. The formulas are
those of Ioffe, Szegedy (arXiv 1502.03167, section 3), in two parts, since rules do what they like
between the statistics of images and those that they normalise by.

On a CPU alone, where it is measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.masters import HALF
from tta.core.tracing import is_recorded

__all__ = ["LARGE_MEAN", "few_passes_back", "normalize_by"]

LARGE_MEAN = 1e-2  # share of variance in the mean square below which digits would be lost

Stats = tuple[Tensor, Tensor]


def few_passes_back(measure: Callable[[Tensor], Stats]) -> Callable[[Tensor], Stats]:
    """Give a function its gradient: from (B, C, ...) to mean and biased variance, each (B, C)."""

    @functools.wraps(measure)
    def measured(x: Tensor) -> Stats:
        if x.ndim > 2 and _is_followed(x):
            result: Any = _Statistics.apply(x, measure)
            return result
        return measure(x)

    return measured


def normalize_by(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, with gradients to all tensors.

    Args:
        x: (B, C, ...).
        mean: (C,) or, one set for each image, (B, C).
        var: Like ``mean``.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: Added to the variance.

    Returns:
        (B, C, ...) of x's dtype.
    """
    wide = torch.float32 if x.dtype in HALF else x.dtype
    known = x.ndim > 2 and (mean.dtype, var.dtype) == (wide, wide)
    # Of statistics for each image, a tensor that does not lie image by image would be copied.
    if known and _is_followed(x, mean) and (mean.ndim == 1 or x.is_contiguous()):
        affine = [None if p is None else p.to(wide) for p in (weight, bias)]
        if len(x) == 1 and mean.ndim == 2:
            mean, var = mean[0], var[0]
        if mean.ndim == 1:
            return _Normalized.apply(x, mean, var, *affine, eps)  # type: ignore[no-any-return]
        # Each channel of each image is a channel of one large image.
        affine = [None if p is None else p.repeat(len(x)) for p in affine]
        flat = x.reshape(1, -1, *x.shape[2:])
        y: Any = _Normalized.apply(flat, mean.reshape(-1), var.reshape(-1), *affine, eps)
        return y.view_as(x)  # type: ignore[no-any-return]
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    if bias is None:
        shift = -mean * scale
    else:
        shift = torch.addcmul(bias.to(mean.dtype), mean, scale, value=-1)
    return torch.addcmul(_by_channel(shift, x), x, _by_channel(scale, x))


def _is_followed(*tensors: Tensor) -> bool:
    """Whether gradients flow into a tensor, by the functions of this module."""
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return False
    on_cpu = all(t.device.type == "cpu" for t in tensors)
    return on_cpu and not is_recorded() and not torch.compiler.is_compiling()


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """(..., C) as a factor of (B, C, ...), in its dtype."""
    return values.to(x.dtype).reshape(-1, x.shape[1], *(1 for _ in x.shape[2:]))


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, measure: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Any:
        mean, var = measure(x)
        ctx.save_for_backward(x, mean, var)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, mean, var = ctx.saved_tensors
        of_mean, of_var = gradients
        count = math.prod(x.shape[2:])
        # d mean / dx = 1 / n and d var / dx = 2 (x - mean) / n
        level, slope = of_mean / count, of_var * (2 / count)
        if bool((var < LARGE_MEAN * mean.square()).any()):  # digits would be lost in one pass
            deviation = x - _by_channel(mean, x)
            return torch.addcmul(_by_channel(level, x), deviation, _by_channel(slope, x)), None
        level = torch.addcmul(level, slope, mean, value=-1)
        return torch.addcmul(_by_channel(level, x), x, _by_channel(slope, x)), None


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, *rest: Any) -> Tensor:
        weight, bias, ctx.eps = rest
        ctx.affine = weight is not None, bias is not None
        ctx.save_for_backward(x, mean, var, weight)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, ctx.eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (of_y,) = gradients
        x, mean, var, weight = ctx.saved_tensors
        inverse = torch.rsqrt(var + ctx.eps)
        scale = inverse if weight is None else inverse * weight
        if torch.is_grad_enabled():  # second gradients to statistics, which the kernel has not
            axes = [0, *range(2, x.ndim)]
            normal = (x - _by_channel(mean, x)) * _by_channel(inverse, x)
            of_x = of_y * _by_channel(scale, x)
            of_weight, of_bias = (of_y * normal).sum(axes), of_y.sum(axes)
        else:
            of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                of_y, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
        of_mean, of_var = -of_bias * scale, of_weight * scale * inverse * -0.5
        affine = (
            g if there else None for g, there in zip((of_weight, of_bias), ctx.affine, strict=True)
        )
        return of_x, of_mean, of_var, *affine, None
