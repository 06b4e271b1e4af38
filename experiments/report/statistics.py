"""Means over seeds, with intervals, so that nobody reads noise as a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from experiments.report.collect import Result

__all__ = ["LEVEL", "Estimate", "difference", "estimate", "over_seeds"]

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: The mean.
        half: Half the width of the interval that covers the true mean with probability `LEVEL` if
            seeds scatter normally (Student's t); None with one seed.
        count: Number of seeds.
    """

    mean: float
    half: float | None
    count: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.half is not None and abs(self.mean) > self.half

    def text(self, scale: float = 1.0, digits: int = 1, sign: bool = False) -> str:
        """The mean, and the interval if there is one."""
        mean = f"{scale * self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half is None else f"{mean} ± {scale * self.half:.{digits}f}"


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """The mean of `values` and its interval; None where a value is missing or there is none."""
    if not values or any(value is None for value in values):
        return None
    numbers = np.array(values, dtype=float)
    n = len(numbers)
    half = None
    if n > 1:
        quantile = float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
        half = float(quantile * numbers.std(ddof=1) / np.sqrt(n))
    return Estimate(float(numbers.mean()), half, n)


def over_seeds(
    results: Sequence[Result], figure: Callable[[Result], float | None]
) -> Estimate | None:
    """The estimate of a figure over the seeds of one method."""
    return estimate([figure(result) for result in results])


def difference(
    results: Sequence[Result],
    baseline: Sequence[Result],
    figure: Callable[[Result], float | None],
) -> Estimate | None:
    """The estimate of how much a figure differs from the baseline's with the same seed.

    Pairs see the same images in the same order, so what seeds have in common cancels out.
    """
    before = {result.seed: figure(result) for result in baseline}
    pairs = [(figure(result), before.get(result.seed)) for result in results]
    if not pairs or any(a is None or b is None for a, b in pairs):
        return None
    return estimate([a - b for a, b in pairs if a is not None and b is not None])
