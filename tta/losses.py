"""Losses on logits, as pure functions; every row is one sample.

All are computed in float32, whatever the logits are in: under autocast a bfloat16 entropy is too
coarse to compare with a threshold.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["entropy"]


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits) in nats.

    Args:
        logits: (B, C).

    Returns:
        (B,), each in [0, ln C].

    Example:
        >>> import torch
        >>> round(float(entropy(torch.zeros(1, 10))), 4)
        2.3026
    """
    logits = logits.float()
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
