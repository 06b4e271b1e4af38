"""Differences of errors with their standard errors, and what the lines of results say of them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from experiments.records import markdown

__all__ = [
    "LIMIT",
    "Aim",
    "Gap",
    "Lines",
    "Row",
    "actions",
    "by",
    "cell_of",
    "count",
    "estimator_errors",
    "gap",
    "gap_of",
    "mean_gap",
    "plain_method",
    "points",
]

SURE = 2.0  # standard errors by which something must be above a limit to be called above it
COLLAPSED = 10.0  # points above source
LIMIT = 1.0  # points above source
Row = Mapping[str, Any]
Lines = Iterator[str]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Gap:
    """A difference of errors in points.

    Args:
        points: The difference.
        error: Its standard error, in points.
    """

    points: float
    error: float

    def above(self, limit: float) -> bool:
        """Whether it is above `limit` by more than twice its standard error."""
        return self.points - limit > SURE * self.error + 1e-9

    def less(self, other: Gap) -> Gap:
        """This difference less one of other images."""
        return Gap(self.points - other.points, math.hypot(self.error, other.error))

    def text(self, limit: float | None = None) -> str:
        """With a sign and one decimal; bold where it is above `limit`."""
        shown = points(self.points)
        return markdown.strong(shown) if limit is not None and self.above(limit) else shown


def points(value: float) -> str:
    """Points with a sign; a figure that is rounded to zero has none."""
    value = round(value, 1)
    return f"{value:+.1f}" if value else "0.0"


def gap_of(row: Row, visits: Sequence[int] | None = None, against: str = "source") -> Gap:
    """How far a method is above another one.

    Args:
        row: A line of results.
        visits: Which visits; None for all.
        against: "source", or "partner" for the method without its guard.
    """
    found = row["visits_found"]
    chosen = range(len(found["images"])) if visits is None else visits
    errors = {"source": "se", "partner": "partner_se"}[against]
    images = sum(found["images"][i] for i in chosen)
    more = sum(found["errors"][i] - found[against][i] for i in chosen)
    spread = math.sqrt(sum((found[errors][i] * found["images"][i]) ** 2 for i in chosen))
    return Gap(100 * more / images, 100 * spread / images)


def mean_gap(gaps: Iterable[Gap]) -> Gap:
    """The mean of differences of other images each, such as those of several seeds."""
    found = list(gaps)
    spread = math.sqrt(sum(gap.error**2 for gap in found))
    return Gap(sum(gap.points for gap in found) / len(found), spread / len(found))


def plain_method(row: Row) -> str:
    """The method of a line without its guard and without fields in brackets."""
    method = row["partner"] or row["method"].removesuffix(f"+{row['guard']}")
    return method.partition("[")[0]


def by(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """Lines by a key, in the order in which keys come."""
    found: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return dict(found)


def estimator_errors(rows: Iterable[Row]) -> list[list[str]]:
    """Of each estimator of accuracy: on what, runs, mean absolute error, mean error, in points."""
    cases: dict[tuple[str, str], list[Mapping[str, float]]] = defaultdict(list)
    for row in rows:
        collapsed = gap_of(row).points > COLLAPSED
        guarded = "with a guard" if row["guard"] or row["recipe"] else "without"
        for name, found in row["estimates"].items():
            cases[name, "all"].append(found)
            cases[name, guarded].append(found)
            if collapsed:
                cases[name, f"{COLLAPSED:.0f} points above source"].append(found)
    lines = []
    for (name, case), found in sorted(cases.items()):
        windows = sum(entry["windows"] for entry in found)

        def mean(figure: Callable[[Mapping[str, float]], float], found: Any = found) -> float:
            total = sum(entry["windows"] for entry in found)
            return 100 * sum(figure(entry) * entry["windows"] for entry in found) / total

        absolute = mean(lambda entry: entry["mae"])
        signed = mean(lambda entry: entry["estimate"] - entry["truth"])
        counts = [str(len(found)), f"{windows:,}"]
        lines.append([name, case, *counts, f"{absolute:.1f}", points(signed)])
    return lines


@dataclass
class Aim:
    """An aim, and how many cells reach it.

    Args:
        text: What is aimed at.
        without: (reached, cells) without guards; None where there is nothing without them.
        guarded: The same with guards.
    """

    text: str
    without: tuple[int, int] | None
    guarded: tuple[int, int]

    def cells(self) -> list[str]:
        """A row of the table."""
        return [self.text, *map(self._share, (self.without, self.guarded))]

    @staticmethod
    def _share(found: tuple[int, int] | None) -> str:
        if found is None or not found[1]:
            return ""
        text = f"{found[0]} of {found[1]}"
        return text if found[0] == found[1] else markdown.strong(text)


def gap(rows: Sequence[Row], visits: Sequence[int] | None = None, against: str = "source") -> Gap:
    """The mean over lines of one cell, see `gap_of`."""
    return mean_gap(gap_of(row, visits, against) for row in rows)


def actions(rows: Sequence[Row]) -> str:
    """What a guard did, in shares of the batches."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row.get("actions", {}))
    total = sum(counts.values())
    shown = [f"{name} {n / total:.1%}" for name, n in counts.most_common() if name != "learn"]
    return ", ".join(shown)


def count(found: Sequence[bool]) -> tuple[int, int]:
    """How many are true, and of how many."""
    return sum(found), len(found)


def cell_of(row: Row) -> tuple[Any, ...]:
    """What lines share that differ in the seed alone."""
    return row["model"], row["stream"], row["batch_size"], row["images"], row["method"]
