"""What a stream shows, in figures, to be looked at before a run: names alone mislead."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from tta.streams.batch import MIXED
from tta.streams.plan import Rows
from tta.streams.pool import Ints

__all__ = ["Preview", "Visit", "summarise"]


@dataclass(frozen=True)
class Visit:
    """One visit of a stream to a domain: consecutive samples of one domain and severity.

    Args:
        domain: Name, or "mixed" where domains alternate inside batches.
        severity: Severity, or None if severities alternate as well.
        step: First batch.
        batches: Number of batches that hold samples of the visit.
        samples: Number of samples.
    """

    domain: str
    severity: float | tuple[float, ...] | None
    step: int
    batches: int
    samples: int


@dataclass(frozen=True)
class Preview:
    """Figures of a stream, to be printed or taken as a dictionary by `as_dict`.

    Args:
        scenario: Name of the scenario.
        batches: Number of batches.
        samples: Number of samples.
        visits: The visits to domains, in the order shown.
        transitions: Changes of domain between consecutive samples: (from, to) -> count.
        resets: Batches before which the model is reset.
        run_length: Mean length of runs of equal labels.
        next_equal: Share of samples whose successor has the same label.
        distinct_labels: Mean number of distinct labels in a batch.
        class_counts: Samples of each class.
        effective_classes: exp of the entropy of the class distribution: the number of equally
            frequent classes that would be as varied.
        repeated: Share of samples whose image came before in the same domain and severity.
        reused: Share of samples whose image (by index) came before anywhere in the stream.
        same_order: Share of positions at which a visit shows the same image as the visit before
            it; 1 means that domains share their order. NaN for one visit.

    >>> from tta.streams import build
    >>> data = np.zeros((20, 8, 8, 3), dtype=np.uint8), np.arange(20) % 4
    >>> print(build("sorted", data, domains=["clean"], batch_size=10).preview())
    sorted: 20 samples in 2 batches, 1 visits, 0 changes of domain, 1 resets
    labels: mean run 5.0, P(next equal) 0.842, 2.0 distinct per batch
    classes: 4 seen, as varied as 4.0 equal ones, largest 5, smallest 5
    images: 0.0% repeated within a domain, 0.0% seen before under any
      step       0  clean severity 0: 2 batches, 20 samples
    """

    scenario: str
    batches: int
    samples: int
    visits: tuple[Visit, ...]
    transitions: Mapping[tuple[str, str], int]
    resets: tuple[int, ...]
    run_length: float
    next_equal: float
    distinct_labels: float
    class_counts: Mapping[int, int]
    effective_classes: float
    repeated: float
    reused: float
    same_order: float

    @property
    def stays(self) -> tuple[Visit, ...]:
        """The former name of `visits`."""
        warnings.warn(
            "Preview.stays is called Preview.visits: use the new name.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.visits

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON types."""
        result = {name: getattr(self, name) for name in self.__dataclass_fields__}
        result["visits"] = [asdict(visit) for visit in self.visits]
        result["transitions"] = [[a, b, n] for (a, b), n in self.transitions.items()]
        result["resets"] = list(self.resets)
        result["class_counts"] = {str(k): n for k, n in self.class_counts.items()}
        result["same_order"] = None if np.isnan(self.same_order) else self.same_order
        return result

    def __str__(self) -> str:
        """Write the figures for people."""
        counts = sorted(self.class_counts.values(), reverse=True)
        shown = self.visits if len(self.visits) <= 16 else self.visits[:15]
        lines = [
            f"{self.scenario}: {self.samples} samples in {self.batches} batches, "
            f"{len(self.visits)} visits, {sum(self.transitions.values())} changes of domain, "
            f"{len(self.resets)} resets",
            f"labels: mean run {self.run_length:.1f}, P(next equal) {self.next_equal:.3f}, "
            f"{self.distinct_labels:.1f} distinct per batch",
        ]
        if counts:
            lines.append(
                f"classes: {len(counts)} seen, as varied as {self.effective_classes:.1f} equal "
                f"ones, largest {counts[0]}, smallest {counts[-1]}"
            )
        order = (
            ""
            if np.isnan(self.same_order)
            else (f", {self.same_order:.1%} in the same place as in the visit before")
        )
        lines.append(
            f"images: {self.repeated:.1%} repeated within a domain, "
            f"{self.reused:.1%} seen before under any{order}"
        )
        for visit in shown:
            level = "" if visit.severity is None else f" severity {visit.severity}"
            lines.append(
                f"  step {visit.step:>7}  {visit.domain}{level}: {visit.batches} batches, "
                f"{visit.samples} samples"
            )
        if len(shown) < len(self.visits):
            lines.append(f"  and {len(self.visits) - len(shown)} more visits")
        return "\n".join(lines)


def summarise(batches: Iterable[tuple[Rows, Ints]], scenario: str) -> Preview:
    """Work out a preview.

    Args:
        batches: (rows, labels) of each batch.
        scenario: The stream's name.
    """
    pieces: list[_Piece] = []
    transitions: dict[tuple[str, str], int] = {}
    resets: list[int] = []
    labels: list[Ints] = []
    # Each sample's image, alone and together with the domain and severity it is shown under.
    index: list[Ints] = []
    shown: list[Ints] = []
    numbers: dict[Any, int] = {}
    distinct: list[int] = []
    last: str | None = None
    for rows, batch_labels in batches:
        # Only the first sample of each run of one condition can change the domain.
        starts = np.flatnonzero(np.diff(rows.which, prepend=-1))
        for name in (rows.conditions[rows.which[i]].domain for i in starts):
            if last is not None and name != last:
                transitions[last, name] = transitions.get((last, name), 0) + 1
            last = name
        pieces += _pieces(rows, starts)
        if rows.reset:
            resets.append(rows.step)
        codes = np.array([numbers.setdefault(c, len(numbers)) for c in rows.conditions])
        shown.append((codes[rows.which] << 40) + rows.index)
        index.append(rows.index)
        labels.append(batch_labels)
        distinct.append(len(np.unique(batch_labels)))
    visits = _merge(pieces)
    joined = np.concatenate(labels) if labels else np.empty(0, dtype=np.int64)
    n = len(joined)
    classes, counts = np.unique(joined, return_counts=True)
    shares = counts / max(1, n)
    changes = int(np.count_nonzero(np.diff(joined)))
    return Preview(
        scenario=scenario,
        batches=len(labels),
        samples=n,
        visits=visits,
        transitions=transitions,
        resets=tuple(resets),
        run_length=n / (changes + 1) if n else 0.0,
        next_equal=1.0 - changes / (n - 1) if n > 1 else 0.0,
        distinct_labels=float(np.mean(distinct)) if distinct else 0.0,
        class_counts={int(k): int(c) for k, c in zip(classes, counts, strict=True)},
        effective_classes=float(np.exp(-np.sum(shares * np.log(shares)))) if n else 0.0,
        repeated=_repeats(shown),
        reused=_repeats(index),
        same_order=_same_order(visits, index),
    )


_Piece = tuple[str, Any, int, int]  # domain, severity, step, samples


def _pieces(rows: Rows, starts: Ints) -> list[_Piece]:
    """Split a batch where the condition changes, unless conditions alternate inside it.

    Args:
        rows: The batch.
        starts: The first row of each run of rows of one condition.
    """
    if len(starts) == len(rows.conditions):
        sizes = np.diff(starts, append=len(rows.index))
        shown = [rows.conditions[rows.which[i]] for i in starts]
        return [
            (c.domain, c.severity, rows.step, int(size))
            for c, size in zip(shown, sizes, strict=True)
        ]
    names = {c.domain for c in rows.conditions}
    levels = {c.severity for c in rows.conditions}
    domain = names.pop() if len(names) == 1 else MIXED
    severity = levels.pop() if len(levels) == 1 else None
    return [(domain, severity, rows.step, len(rows.index))]


def _merge(pieces: list[_Piece]) -> tuple[Visit, ...]:
    """Join consecutive pieces of one domain and severity."""
    visits = []
    for (domain, severity), items in groupby(pieces, key=lambda piece: piece[:2]):
        group = list(items)
        samples = sum(piece[3] for piece in group)
        batches = group[-1][2] - group[0][2] + 1
        visits.append(Visit(domain, severity, group[0][2], batches, samples))
    return tuple(visits)


def _repeats(parts: list[Ints]) -> float:
    """Return the share of entries that occurred before."""
    total = sum(len(part) for part in parts)
    return 1.0 - len(np.unique(np.concatenate(parts))) / total if total else 0.0


def _same_order(visits: tuple[Visit, ...], index: list[Ints]) -> float:
    """Compare each visit's images, position by position, with the visit before."""
    if len(visits) < 2:
        return float("nan")
    ends = np.cumsum([visit.samples for visit in visits])
    parts = np.split(np.concatenate(index), ends[:-1])
    same = compared = 0
    for before, now in pairwise(parts):
        n = min(len(before), len(now))
        same += int(np.count_nonzero(before[:n] == now[:n]))
        compared += n
    return same / compared
