"""The batch policy, which cuts visits into batches such that any batch is found by its number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tta.streams.draws import Draws
from tta.streams.pool import Ints
from tta.streams.schedules import PlannedVisit
from tta.streams.sources import Condition

__all__ = ["Plan", "Rows", "Segment", "interleaved"]


@dataclass(frozen=True)
class Segment:
    """A contiguous part of one visit: samples [start, stop) of its order.

    Args:
        visit: Number of the planned visit.
        start: The first sample.
        stop: The number after that of the last sample.
        reset: Whether the scenario resets the model before it.
    """

    visit: int
    start: int
    stop: int
    reset: bool = False


@dataclass(frozen=True)
class Rows:
    """One batch before any image is read.

    Args:
        step: Number of the batch.
        index: (B,) positions in the dataset of each row's condition.
        which: (B,) number of each row's condition in `conditions`.
        conditions: What is shown; one entry unless the batch is mixed.
        visit: Number of the planned visit that the first row belongs to.
        reset: Whether the scenario resets the model before this batch.
        since_reset: Batches since the last reset (0 for the batch after it).
    """

    step: int
    index: Ints
    which: Ints
    conditions: tuple[Condition, ...]
    visit: int
    reset: bool
    since_reset: int


class Plan:
    """All batches of a stream, each found by its number without the ones before it.

    Args:
        visits: The planned visits.
        segments: Parts of the visits, in the order shown.
        order_of: Gives the order of the visit of that number: (index (n,), which (n,)).
        batch_size: Samples per batch.
        last_batch: What happens to a remainder: "keep" a short batch at the end of each segment,
            "drop" it, or "span" (batches run across segments, up to the next reset).
    """

    def __init__(
        self,
        visits: Sequence[PlannedVisit],
        segments: Sequence[Segment],
        order_of: Callable[[int], tuple[Ints, Ints]],
        batch_size: int,
        last_batch: str,
    ) -> None:
        self.visits = visits
        self.segments = segments
        self.batch_size = batch_size
        self._order_of = order_of
        sizes = np.array([s.stop - s.start for s in segments], dtype=np.int64)
        resets = np.array([s.reset for s in segments], dtype=bool)
        begins = np.ones(len(segments), dtype=bool)
        if last_batch == "span":
            begins = resets.copy()
            begins[:1] = True
        # A run is a group of segments that batches may cross; runs share nothing.
        self._run_segment = np.flatnonzero(begins)
        ends = np.cumsum(sizes)
        self._segment_start = ends - sizes
        self._run_start = self._segment_start[self._run_segment]
        self._run_size = np.diff(np.append(self._run_start, ends[-1] if len(ends) else 0))
        whole = self._run_size // batch_size
        partial = (self._run_size % batch_size > 0) & (last_batch != "drop")
        batches = whole + partial
        self._run_end = np.cumsum(batches)
        self._run_step = self._run_end - batches
        self._reset_steps = self._run_step[resets[self._run_segment] & (batches > 0)]

    def __len__(self) -> int:
        """Return the number of batches."""
        return int(self._run_end[-1]) if len(self._run_end) else 0

    def rows(self, step: int) -> Rows:
        """Return one batch's rows.

        Args:
            step: Number in [0, len(self)).
        """
        assert 0 <= step < len(self)
        run = int(np.searchsorted(self._run_end, step, side="right"))
        offset = (step - int(self._run_step[run])) * self.batch_size
        first = int(self._run_start[run]) + offset
        last = min(first + self.batch_size, int(self._run_start[run] + self._run_size[run]))
        position = int(np.searchsorted(self._segment_start, first, side="right")) - 1
        conditions: list[Condition] = []
        indices, codes = [], []
        visit = self.segments[position].visit
        while first < last:
            segment = self.segments[position]
            start = first - int(self._segment_start[position]) + segment.start
            stop = min(segment.stop, start + last - first)
            index, which = self._order_of(segment.visit)
            shown = self.visits[segment.visit].conditions
            indices.append(index[start:stop])
            codes.append(which[start:stop] + len(conditions))
            conditions += shown
            first += stop - start
            position += 1
        kept, which = _compact(conditions, np.concatenate(codes))
        since = self.since_reset(step)
        return Rows(
            step=step,
            index=np.concatenate(indices),
            which=which,
            conditions=kept,
            visit=visit,
            reset=step in self._reset_steps,
            since_reset=since,
        )

    def since_reset(self, step: int) -> int:
        """Batches since the last reset before that of `step`, or since the start."""
        past = int(np.searchsorted(self._reset_steps, step, side="right"))
        return step - (int(self._reset_steps[past - 1]) if past else 0)


def _compact(conditions: list[Condition], which: Ints) -> tuple[tuple[Condition, ...], Ints]:
    """Keep the conditions that occur, once each, and renumber the rows."""
    if len(conditions) == 1:
        return tuple(conditions), which
    numbers: dict[Condition, int] = {}
    used = np.unique(which)
    renumber = np.zeros(len(conditions), dtype=np.int64)
    for code in used:
        renumber[code] = numbers.setdefault(conditions[code], len(numbers))
    return tuple(numbers), renumber[which]


def interleaved(
    visits: Sequence[PlannedVisit], counts: Sequence[int], batch_size: int, seed: int
) -> list[Segment]:
    """Cut each cycle into runs of batches in random order (CDC, as ReservoirTTA defines it).

    While batches of the cycle remain: pick a remaining domain uniformly and show a uniform
    1..remaining number of its batches.

    Args:
        visits: The planned visits, cycle by cycle.
        counts: Samples of each visit.
        batch_size: Samples per batch.
        seed: The stream's seed.
    """
    segments = []
    for cycle in sorted({visit.cycle for visit in visits}):
        draws = Draws(seed, "interleave", cycle)
        queue = {i: 0 for i, visit in enumerate(visits) if visit.cycle == cycle and counts[i]}
        while queue:
            chosen = list(queue)[int(draws.below(len(queue), 1)[0])]
            start = queue[chosen]
            remaining = -(-(counts[chosen] - start) // batch_size)
            taken = 1 + int(draws.below(remaining, 1)[0])
            stop = min(start + taken * batch_size, counts[chosen])
            segments.append(Segment(chosen, start, stop))
            queue[chosen] = stop
            if stop == counts[chosen]:
                del queue[chosen]
    return segments
