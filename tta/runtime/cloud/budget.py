"""Which images a device sends up: those of which it is least sure, within a budget."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from tta.core.checks import LARGEST, fraction, whole_number

__all__ = ["Budget"]


class Budget:
    """Chooses a share of the images of a stream, by the order of their uncertainty alone.

    An image is chosen if its uncertainty is above the (1 - share)-quantile of the last images,
    those of its own batch among them. While uncertainty rises that alone would choose more than the
    share. So the sum is kept as well: of the first n images never more than ``share * n`` are
    chosen, the most uncertain ones first, and after a quiet time at most ``share * window`` are
    made up for.

    Args:
        share: Of all images, in [0, 1].
        window: Images that the quantile looks back on.

    Example:
        >>> budget = Budget(0.5)
        >>> budget.choose(torch.tensor([0.1, 0.9, 0.2, 0.4])).tolist()
        [False, True, False, True]
    """

    def __init__(self, share: float, window: int = 1000) -> None:
        self.share = fraction("budget", share)
        self.window = whole_number("window", window, 1, LARGEST)
        self.threshold = math.nan  # of the last batch
        self._last: deque[float] = deque(maxlen=self.window)
        self._left = 0.0  # images that may be chosen

    @property
    def largest(self) -> float:
        """The largest uncertainty of the last images; 0 before there are any."""
        return max(self._last, default=0.0)

    def choose(self, uncertainty: Tensor) -> Tensor:
        """Return a mask (B,) of the images of a batch to send, and remember the batch.

        Args:
            uncertainty: (B,); NaN for images that are neither counted nor sent.
        """
        known = ~uncertainty.isnan()
        values = uncertainty.double()
        self._last.extend(values[known].tolist())
        chosen = torch.zeros(len(values), dtype=torch.bool)
        if not bool(known.any()) or self.share == 0:
            return chosen
        if self.share == 1:
            self.threshold = -math.inf  # the least uncertain one of all goes too
        else:
            last = torch.tensor(list(self._last), dtype=torch.float64)
            self.threshold = float(last.quantile(1 - self.share))
        above = known & (values > self.threshold)
        order = values.where(above, values.new_tensor(-math.inf)).argsort(descending=True)
        self._left += self.share * int(known.sum())
        count = min(int(above.sum()), int(self._left + 1e-9))  # sums of shares round
        chosen[order[:count]] = True
        self._left = min(self._left - count, max(1.0, self.share * self.window))
        return chosen
