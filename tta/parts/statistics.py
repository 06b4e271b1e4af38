"""Statistics of single images, drawn to those of many."""

from __future__ import annotations

import math
from types import SimpleNamespace

from torch import Tensor

from tta.core.norm_layers import instance_stats, normalize

__all__ = ["instance_aware"]


def instance_aware(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    alpha: float,
    eps: float,
) -> Tensor:
    """Instance-aware batch normalisation (NOTE, arXiv 2208.05117).

    The mean and the unbiased variance of an image over its L values in a channel have standard
    errors, were they drawn from the given statistics. What an image is off by up to ``alpha`` of
    these is taken for chance, and only the rest moves its statistics. With L = 1 they are the given
    ones.

    Args:
        x: (B, C, ...).
        mean: (C,).
        variance: (C,), unbiased.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        alpha: Standard errors that count as chance; 0 = instance normalisation.
        eps: Added to variances.

    Returns:
        (B, C, ...) of x's dtype. Gradients flow into everything.

    Example:
        >>> import torch
        >>> x, zeros, ones = torch.randn(2, 3, 8, 8), torch.zeros(3), torch.ones(3)
        >>> y = instance_aware(x, zeros, ones, None, None, alpha=1e6, eps=0.0)
        >>> torch.allclose(y, x)
        True
    """
    base = SimpleNamespace(weight=weight, bias=bias, eps=eps)
    count = math.prod(x.shape[2:])
    if count <= 1:
        return normalize(x, mean, variance, base)
    means, variances = instance_stats(x)  # (B, C)
    variances = variances * (count / (count - 1))
    spread = variance + eps
    mean = mean + _shrunk(means - mean, alpha * (spread / count).sqrt())
    error = alpha * math.sqrt(2 / (count - 1)) * spread
    return normalize(x, mean, (variance + _shrunk(variances - variance, error)).relu(), base)


def _shrunk(x: Tensor, threshold: Tensor) -> Tensor:
    """What of ``x`` (B, C) lies beyond ``threshold`` (C,) on either side of 0."""
    return (x - threshold).relu() - (-x - threshold).relu()
