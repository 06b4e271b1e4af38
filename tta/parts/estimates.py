"""Estimates of accuracy without labels."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dropout_error"]


def dropout_error(
    logits: Tensor, dropped: Tensor, power: float = 3.0, rounded: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Error of predictions, from how often they change under dropout (AETTA).

    Args:
        logits: (B, C), without dropout.
        dropped: (N, B, C) of N passes with dropout.
        power: How strongly a low entropy of the mean prediction, as of a collapsed model, raises
            the error.
        rounded: Whether ln C is rounded to four decimals, as in the authors' code.

    Returns:
        Agreement in [0, 1], entropy of the mean prediction in nats, and the error in [0, 1 - 1/C];
        tensors without axes.
    """
    classes = logits.shape[1]
    agreement = (dropped.argmax(2) == logits.argmax(1)).float().mean()
    mean = dropped.float().softmax(2).mean((0, 1))
    spread = -(mean * (mean + 1e-6).log()).sum()
    largest = torch.tensor(float(classes), device=logits.device).log()
    largest = (largest * 1e4).round() / 1e4 if rounded else largest
    error = (1 - agreement) / (spread / largest) ** power
    return agreement, spread, error.nan_to_num(0.0).clamp(0, 1 - 1 / classes)
