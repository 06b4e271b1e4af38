"""Accuracy when time counts: three figures of a stream with a `tta.streams.Clock`.

They are Tempora's time-contingent utilities (ICML 2026), all in [0, 1], higher is better:

* discrete: share of images answered rightly and in time; what the clock calls late is wrong.
* continuous: mean over images of 1 / (1 + latency / half-life) for a right answer, 0 for a wrong
  one: an answer after one half-life is worth a half, after three a quarter.
* amortised: share of images answered rightly by a method that learned until its extra time was
  used up and was frozen from then on.

The first needs a clock, the second its `half_life`, the third its `overhead`. Times are in plain
forwards of a batch, so that with a declared ratio all three are the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tta.core.checks import number
from tta.streams import Clock

__all__ = ["UTILITIES", "Utilities", "amortised", "continuous", "discrete"]

UTILITIES = ("discrete", "continuous", "amortised")


def discrete(right: ArrayLike, late: ArrayLike) -> float:
    """Share of images answered rightly and in time.

    Args:
        right: (N,) bool: the prediction is the label.
        late: (N,) bool, or one for all: the clock called the batch late.

    >>> discrete([True, True, False, True], [False, True, False, False])
    0.5
    """
    return float(np.mean(np.asarray(right, bool) & ~np.asarray(late, bool)))


def continuous(right: ArrayLike, latency: ArrayLike, half_life: float) -> float:
    """Mean worth of the answers, which decays hyperbolically with the time they took.

    Args:
        right: (N,) bool: the prediction is the label.
        latency: (N,) or one for all, 0 or more, in any unit of time.
        half_life: Latency at which a right answer is worth a half, above 0, in the same unit.

    >>> continuous([True, True, False, True], [0.0, 2.0, 0.0, 6.0], half_life=2.0)
    0.4375
    """
    half_life = number("half_life", half_life, 0.0, 1e9, above=True)
    worth = 1 / (1 + np.asarray(latency, float) / half_life)
    return float(np.mean(np.asarray(right, bool) * worth))


def amortised(right: ArrayLike, frozen: ArrayLike, extra: ArrayLike, overhead: float) -> float:
    """Share of right answers of a method that learns until its extra time is used up.

    For predictions that are there already. A clock with `overhead` freezes the method in the run.

    Args:
        right: (K,) share of right answers in each batch while the method learns.
        frozen: (K,) the same of the method as it is when the time is used up.
        extra: (K,) extra time of each batch when it is learned from, 0 or more.
        overhead: Extra time for learning, 0 or more, in the same unit.

    >>> amortised([0.5, 0.5, 1.0, 1.0], [0.0, 0.5, 0.5, 0.75], [2.0, 2.0, 2.0, 2.0], overhead=3.0)
    0.5625
    """
    overhead = number("overhead", overhead, 0.0, 1e9)
    used = np.cumsum(np.asarray(extra, float))
    learns = np.concatenate([[0.0], used[:-1]]) < overhead
    return float(np.mean(np.where(learns, np.asarray(right, float), np.asarray(frozen, float))))


@dataclass
class Utilities:
    """Sums of the figures over the images of a stream.

    Args:
        images: Images under a clock; 0 without one.
        discrete: Sum over the images.
        continuous: Likewise; None without a half-life.
        amortised: Likewise; None without an overhead.
        spent: Extra time used so far, in plain forwards, where the clock is measured.
    """

    images: int = 0
    discrete: float = 0.0
    continuous: float | None = None
    amortised: float | None = None
    spent: float = 0.0

    def add(self, clock: Clock, right: Any, late: bool, latency: float) -> None:
        """Count the images of a batch.

        Args:
            clock: Of the stream.
            right: (B,) bool.
            late: Whether the batch was late.
            latency: Of the batch, in plain forwards.
        """
        self.images += len(right)
        self.discrete += len(right) * discrete(right, late)
        if clock.half_life is not None:
            worth = len(right) * continuous(right, latency, clock.half_life)
            self.continuous = (self.continuous or 0.0) + worth
        if clock.overhead is not None:
            self.amortised = (self.amortised or 0.0) + float(np.sum(right))

    def summary(self) -> dict[str, float | None]:
        """The figures; none without a clock."""
        if not self.images:
            return {}
        sums = {name: getattr(self, name) for name in UTILITIES}
        return {name: None if s is None else s / self.images for name, s in sums.items()}
