"""The order of each visit: a subset, a selection and an arrangement, each with its own draws."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tta.streams.building_blocks import ARRANGEMENTS, SELECTIONS, options_of
from tta.streams.draws import Draws
from tta.streams.pool import Ints, Pool
from tta.streams.schedules import PlannedVisit
from tta.streams.sources import Domains

__all__ = ["Orders"]

#: Orders kept in memory; interleaved streams go back and forth between a cycle's domains.
_KEPT = 32


class Orders:
    """Draws the orders of the visits when they are needed.

    Args:
        visits: The planned visits.
        domains: The data, which sizes and labels are read from.
        select: Name of the selection.
        arrange: Name of the arrangement.
        options: Options of both.
        seed: The stream's seed.
        shared_order: Whether the visits of one cycle share their draws.
        num_samples: Largest number of samples per condition; None = all.
    """

    def __init__(
        self,
        visits: Sequence[PlannedVisit],
        domains: Domains,
        *,
        select: str,
        arrange: str,
        options: Mapping[str, Any],
        seed: int,
        shared_order: bool,
        num_samples: int | None,
    ) -> None:
        self.visits = visits
        self._domains = domains
        self._select, self._arrange = SELECTIONS[select], ARRANGEMENTS[arrange]
        self._select_options = {name: options[name] for name in options_of(self._select)}
        self._arrange_options = {name: options[name] for name in options_of(self._arrange)}
        self._seed = seed
        self._shared = shared_order
        self._num_samples = num_samples
        self._kept: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()

    def check(self) -> None:
        """Reject options that cannot work on these samples, before any batch is made."""
        check, select = self._arrange.check, self._select
        if check is None:
            return
        seen = set()
        for visit in self.visits:
            # Visits to the same datasets have the same labels; looking once is enough,
            # unless the selection changes the classes' sizes.
            key = tuple(id(self._domains.source(c)) for c in visit.conditions)
            if key not in seen or not select.same_size:
                seen.add(key)
                check(self._selected(visit), self._arrange_options)

    def count(self, number: int) -> int:
        """Return how many samples visit `number` shows; nothing is drawn unless that decides it."""
        visit = self.visits[number]
        if self._select.same_size and self._arrange.same_size:
            return sum(self._size(visit, i) for i in range(len(visit.conditions)))
        if self._arrange.same_size:
            return len(self._selected(visit))
        return len(self.order(number)[0])

    def order(self, number: int) -> tuple[Ints, Ints]:
        """Return the order of visit `number`: dataset positions and condition numbers, (n,)."""
        if number not in self._kept:
            visit = self.visits[number]
            selected = self._selected(visit)
            draws = Draws(self._seed, "arrange", *visit.key(self._shared))
            rows = self._arrange.function(selected, draws, **self._arrange_options)
            if len(self._kept) >= _KEPT:
                self._kept.popitem(last=False)
            self._kept[number] = (selected.index[rows], selected.which[rows])
        self._kept.move_to_end(number)
        return self._kept[number]

    def _selected(self, visit: PlannedVisit) -> Pool:
        pool = self._pool(visit)
        draws = Draws(self._seed, "select", *visit.key(self._shared))
        return pool.take(self._select.function(pool, draws, **self._select_options))

    def _size(self, visit: PlannedVisit, i: int) -> int:
        """Return how many samples of the visit's i-th condition are in its pool."""
        size = len(self._domains.source(visit.conditions[i]))
        if visit.shares is not None:
            size = round(size * visit.shares[i])
        caps = [cap for cap in (self._num_samples, visit.limit) if cap is not None]
        return min([size, *caps])

    def _pool(self, visit: PlannedVisit) -> Pool:
        """Gather the samples of a visit's conditions."""
        parts = []
        for i, condition in enumerate(visit.conditions):
            full, size = len(self._domains.source(condition)), self._size(visit, i)
            rows = np.arange(full)
            if size < full:
                place = () if self._shared else (i,)
                draws = Draws(self._seed, "subset", *visit.key(self._shared), *place)
                # In the dataset's order: some arrangements build on it.
                rows = np.sort(draws.permutation(full)[:size])
            parts.append(rows)
        index = np.concatenate(parts)
        which = np.repeat(np.arange(len(parts)), [len(rows) for rows in parts])

        def read_labels() -> Ints:
            return np.concatenate(
                [
                    self._domains.source(condition).labels[rows]
                    for condition, rows in zip(visit.conditions, parts, strict=True)
                ]
            )

        return Pool(index, which, read_labels)
