"""Which samples of a batch a method learns from, and the averages that decide about it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["move_average", "non_redundant"]


@torch.no_grad()
def move_average(average: Tensor, value: Tensor, momentum: float = 0.9) -> None:
    """Move an exponential average in place; the first value, after NaN, becomes the average.

    Args:
        average: Any shape; NaN while undefined.
        value: Like ``average``.
        momentum: Share of the old average that stays.
    """
    moved = momentum * average + (1 - momentum) * value
    average.copy_(torch.where(average.isnan(), value, moved))


def non_redundant(probs: Tensor, average: Tensor, margin: float) -> Tensor:
    """Samples whose prediction differs enough from the average of earlier ones (EATA, eq. 5).

    Args:
        probs: (B, C) predicted probabilities.
        average: (C,) moving average of earlier ones; all NaN while there is none.
        margin: Largest cosine similarity, strict.

    Returns:
        (B,) bool; all True while there is no average.
    """
    similarity = F.cosine_similarity(average[None], probs, dim=1)
    return (similarity.abs() < margin) | similarity.isnan()
