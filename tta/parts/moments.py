"""Mean and variance of rows that come in batches."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RunningMoments"]


class RunningMoments:
    """Collects rows, in float64 and around the mean of the first batch."""

    def __init__(self) -> None:
        self.count = 0
        self._origin = self._sum = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in more rows (B, ...)."""
        rows = rows.double()
        if self.count == 0:
            self._origin = rows.mean(0)
            self._sum = self._squares = torch.zeros_like(self._origin)
        offsets = rows - self._origin
        self._sum = self._sum + offsets.sum(0)
        self._squares = self._squares + offsets.square().sum(0)
        self.count += len(rows)

    def mean(self) -> Tensor:
        """Mean of all rows (...)."""
        self._check(1)
        return self._origin + self._sum / self.count

    def variance(self) -> Tensor:
        """Unbiased variance of all rows (...)."""
        self._check(2)
        scatter = self._squares - self._sum.square() / self.count
        return (scatter / (self.count - 1)).clamp_min(0)

    def _check(self, needed: int) -> None:
        if self.count < needed:
            raise ValueError(
                f"`source` must hold at least {needed} images, got {self.count}: pass an iterable "
                "of (images, labels) that was not read to its end."
            )
