"""Means over seeds, with intervals, so that nobody reads noise as a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.report.collect import Result

__all__ = ["LEVEL", "SAME", "Estimate", "difference", "estimate", "over_seeds", "verdict"]

LEVEL = 0.95
SAME = 0.0005  # share of errors, half of the last digit of tables: less than this is no difference


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and how far it may be trusted.

    Args:
        mean: The mean.
        half: Half the width of the interval that covers the true mean with probability `LEVEL` if
            seeds scatter normally (Student's t); None with fewer than three seeds. Two values say
            so little of their scatter that the interval would be 13 times as wide as they lie
            apart; they are shown instead.
        values: Of the seeds, in their order.
    """

    mean: float
    half: float | None
    values: tuple[float, ...]

    @property
    def count(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def low(self) -> float:
        """The lower end of the interval; with two seeds the smaller value."""
        return min(self.values) if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end of the interval; with two seeds the larger value."""
        return max(self.values) if self.half is None else self.mean + self.half

    @property
    def clear(self) -> bool:
        """Whether several seeds agree on the sign: both of two, or the whole interval."""
        return self.count > 1 and (self.low > 0 or self.high < 0)

    def text(self, scale: float = 1.0, digits: int = 1, sign: bool = False) -> str:
        """The mean with its interval, or the values of one or two seeds."""
        if self.half is None:
            return ", ".join(_rounded(scale * value, digits, sign) for value in self.values)
        half = _rounded(scale * self.half, digits)
        return f"{_rounded(scale * self.mean, digits, sign)} ± {half}"


def _rounded(value: float, digits: int, sign: bool = False) -> str:
    """A figure with so many decimals; one that is rounded to zero has no sign."""
    value = round(value, digits)
    return f"{value:{'+' if sign else ''}.{digits}f}" if value else f"{0:.{digits}f}"


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """The mean of `values` and its interval, if any; None where there is no value or one misses."""
    if not values or any(value is None for value in values):
        return None
    numbers = np.array(values, dtype=float)
    n = len(numbers)
    half = None
    if n > 2:
        from scipy import stats  # slow to import

        quantile = float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
        half = float(quantile * numbers.std(ddof=1) / np.sqrt(n))
    return Estimate(float(numbers.mean()), half, tuple(numbers.tolist()))


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


def verdict(gap: Estimate) -> str:
    """What a difference of errors to the baseline's says, for words anywhere.

    Args:
        gap: Shares of errors, less those of the baseline.

    Returns:
        "better", "worse", "same" (less than tables show), or "open" where several seeds do not
        agree on the sign.
    """
    if gap.count > 1 and not gap.clear and max(abs(gap.low), abs(gap.high)) > SAME:
        return "open"
    if abs(gap.mean) <= SAME:
        return "same"
    return "better" if gap.mean < 0 else "worse"
