"""Where the features of a stream lie, seen from the source's mean, with every class counted once.

The mean of all features carries the share of each class: of a stretch of one class it is the mean
of that class. Here every predicted class has a displacement of its own, and their mean over all C
classes is used, so that a class that is seen alone moves it by one part in C.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ClassDisplacements"]

PRIOR_IMAGES = 4.0  # images without displacement that each class starts with


class ClassDisplacements(nn.Module):
    """Mean displacement of the features of each predicted class.

    Args:
        classes: Number of classes C.
        width: Length D of the features.
    """

    displacements: Tensor  # (C, D)
    counts: Tensor  # (C,) images so far

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        zeros = torch.zeros(classes, width, dtype=torch.float32)
        self.register_buffer("displacements", zeros)
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.int64))

    @torch.no_grad()
    def move(self, offsets: Tensor, labels: Tensor, rate: float = 0.0) -> None:
        """Take in a batch.

        Each class has the mean over its images and four more without displacement, which keep a
        class of few images near 0.

        Args:
            offsets: Features less the reference, (B, D).
            labels: Predicted classes (B,).
            rate: Smallest weight of a batch's images against the earlier ones; 0 = mean of all.
        """
        batch = torch.zeros_like(self.counts).index_add_(0, labels, torch.ones_like(labels))
        total = torch.zeros_like(self.displacements).index_add_(0, labels, offsets.float())
        self.counts += batch
        weight = (batch / (self.counts + PRIOR_IMAGES)).clamp_min(rate)
        weight = torch.where(batch > 0, weight, 0.0)[:, None]
        mean = total / batch.clamp_min(1)[:, None]
        self.displacements += weight * (mean - self.displacements)

    def mean(self) -> Tensor:
        """Mean (D,) over all C classes."""
        return self.displacements.mean(0)
