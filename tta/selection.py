"""Which samples of a batch a method learns from, as pure functions that return masks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["non_redundant"]


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
