"""The soft Hebbian rule of SoftHebb (Journe et al., ICLR 2023, arXiv 2209.11883), for convolutions.

Filters compete for each patch a_n by a softmax of their responses u_nk = w_k . a_n, and move
towards the patches that they win, less a decay that keeps their length near 1.

    y_n = softmax_k(u_nk / tau),   Delta_k = mean_n y_nk (a_n - u_nk w_k)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

__all__ = ["delta"]


@torch.no_grad()
def delta(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    tau: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """By how much the rule moves the filters of a convolution.

    Args:
        x: What the convolution is given (B, I, H, W).
        weight: Its filters (O, I, k, k), without bias.
        stride: Of the convolution.
        padding: Zeros around ``x``.
        tau: Temperature of the competition, above 0.

    Returns:
        Delta (O, I, k, k), a mean over all positions, and how much of the positions each filter
        wins (O,), which sums to 1.

    Example:
        >>> x = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 0.5]]).view(2, 2, 1, 1)
        >>> found, usage = delta(x, weight)
        >>> found.flatten(1), usage
        (tensor([[0.0000, 1.0000],
                [0.5000, 0.7500]]), tensor([0.5000, 0.5000]))
    """
    moves: Any = {"stride": stride, "padding": padding}
    with torch.autocast(x.device.type, enabled=False):
        u = F.conv2d(x, weight, **moves)
        y = (u / tau).softmax(1)
        # sum_n y_nk a_n is the gradient of a weight for which y is that of the output; patches
        # are never laid out one by one, which takes k^2 times the memory of the images.
        pull = conv2d_weight(x, weight.shape, y, **moves)
        decay = (y * u).sum((0, 2, 3)).view(-1, 1, 1, 1) * weight
        positions = u.numel() // u.shape[1]
        return (pull - decay) / positions, y.mean((0, 2, 3))
