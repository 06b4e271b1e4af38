"""The stream, which makes each batch from its number alone when it is asked for."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta.core.checks import LARGEST, whole_number
from tta.streams.batch import MIXED, Batch
from tta.streams.building_blocks import SCHEDULES
from tta.streams.clock import Clock, Stopwatch, Turn
from tta.streams.draws import Draws
from tta.streams.items import concatenate
from tta.streams.plan import Plan, Rows
from tta.streams.pool import Ints
from tta.streams.preview import Preview, summarise
from tta.streams.reading import read_ahead
from tta.streams.sources import Domains, Images
from tta.streams.strip import draw_strip

__all__ = ["Stream"]


class Stream:
    """An iterable of `Batch`es; made by `build`.

    Iterating again starts over and gives the same batches. A batch depends on the configuration
    and its step only, so a stream continued with `from_step` equals one run through.

    Args:
        plan: Says which samples each batch holds.
        domains: Reads and transforms the samples.
        config: JSON-able arguments of `build` that reproduce the stream.
        clock: The time budget, or None.
        window: Images kept for single-sample streams, or None.

    >>> import numpy as np
    >>> from tta.streams import build
    >>> data = np.zeros((20, 8, 8, 3), dtype=np.uint8), np.arange(20) % 4
    >>> stream = build("continual", data, domains=["clean"], batch_size=8)
    >>> [(batch.step, len(batch), batch.reset) for batch in stream]
    [(0, 8, True), (1, 8, False), (2, 4, False)]
    >>> [batch.step for batch in stream.from_step(2)]
    [2]
    """

    def __init__(
        self,
        plan: Plan,
        domains: Domains,
        config: dict[str, Any],
        clock: Clock | None,
        window: int | None,
    ) -> None:
        self._plan = plan
        self._domains = domains
        self._config = config
        self._window = window
        self._start = self._threads = 0
        self.clock = clock
        self.stopwatch = Stopwatch(clock) if clock is not None and clock.measured else None

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of `build` that reproduce the stream, as plain JSON types."""
        return copy.deepcopy(self._config)

    def __len__(self) -> int:
        """Return the number of batches from the start step on."""
        return len(self._plan) - self._start

    def __repr__(self) -> str:
        """Say what the stream is."""
        c = self._config
        return (
            f"Stream({c['scenario']!r}, {len(c['domains'])} domains, {len(self)} batches of "
            f"{c['batch_size']}, seed {c['seed']})"
        )

    def recurrence(self, visit: int) -> int | None:
        """Which showing of all domains a visit belongs to, from 0; None unless they recur.

        Args:
            visit: Its number, as in :attr:`Batch.visit`.

        >>> import numpy as np
        >>> from tta.streams import build
        >>> data = np.zeros((20, 8, 8, 3), dtype=np.uint8), np.arange(20) % 4
        >>> stream = build("recurring", data, domains=["clean"], batch_size=10, visits=2)
        >>> [stream.recurrence(batch.visit) for batch in stream]
        [0, 0, 1, 1]
        """
        schedule = SCHEDULES.get(self._config.get("schedule", ""))
        recurs = schedule is not None and schedule.recurs
        return self._plan.visits[visit].cycle if recurs else None

    def from_step(self, n: int) -> Stream:
        """Return the stream from batch `n` of the whole stream on; no image before it is made.

        With a measured clock the view starts without a pending delay.

        Args:
            n: Batch number, as in `Batch.step`; the whole stream's length gives an empty one.
        """
        n = whole_number("n", n, 0, LARGEST)
        if n > len(self._plan):
            raise ValueError(
                f"`n` must be at most the stream's length, {len(self._plan)} batches, got {n}"
            )
        view = copy.copy(self)
        view._start = n
        if self.clock is not None and self.clock.measured:
            view.stopwatch = Stopwatch(self.clock)
        return view

    def prefetch(self, threads: int) -> Stream:
        """Return the same stream from its start on, with items of datasets read ahead by threads.

        For datasets whose items are files that take time to decode; arrays are read when they are
        asked for, and transforms, such as corruptions on a GPU, stay with the caller's thread.

        Args:
            threads: Batches read at once, no more than there are cores; 0 to read none ahead.
                Several threads then call the datasets' `__getitem__` at once, which must open its
                files itself (and not move the position of one they share) and give the same image
                each time. They read outside of the caller's contexts, such as autocast, and end
                with the batch they are at when the loop is left.
        """
        view = self.from_step(self._start)
        view._threads = whole_number("threads", threads, 0, 1024)
        return view

    def rows(self) -> Iterator[tuple[Rows, Ints]]:
        """Iterate over (rows, labels (B,)) of each batch without making images."""
        for step in range(self._start, len(self._plan)):
            rows = self._plan.rows(step)
            yield rows, self._labels(rows)

    def preview(self, draw: str | Path | None = None) -> Preview:
        """Summarise what the stream shows, from indices and labels alone.

        No model is run and no image is made; a dataset that cannot tell its labels otherwise is
        read through once.

        Args:
            draw: File of a PNG to draw, of domain, label and severity over time; needs matplotlib.
        """
        if draw is not None:
            draw_strip(self.rows(), self.config, draw)
        return summarise(self.rows(), self._config["scenario"])

    def __iter__(self) -> Iterator[Batch]:
        """Make the batches one by one."""
        watch = self.stopwatch
        if watch is not None:
            watch.restart()
        turns = None if self.clock is None else self.clock.turns(self._start, self._wants)
        recent: deque[Tensor] = deque(maxlen=self._window or 1)
        for rows, read in self._read():
            step = rows.step
            if self._window is not None and step == self._start:
                # A stream taken up in the middle needs the images its window would hold.
                back = min(rows.since_reset, self._window - 1)
                recent.extend(
                    self._images(self._plan.rows(s), {}) for s in range(step - back, step)
                )
            turn = Turn(late=False, learns=self._wants(step), latency=None)
            if watch is not None:
                wanted = self._wants(step)
                late = watch.tick(wanted)
                turn = Turn(late, watch.learns and wanted and not late, None)
            elif turns is not None:
                turn = next(turns)
            yield self._batch(rows, read, turn, recent)

    def _wants(self, step: int) -> bool:
        """Whether a batch is learned from where there is time; with a window, what fills it."""
        window = self._window or 1
        return self._plan.since_reset(step) % window == window - 1

    def _read(self) -> Iterator[tuple[Rows, dict[int, Images]]]:
        """Iterate over rows and the images that were read ahead, by number of the condition."""
        steps = range(self._start, len(self._plan))
        threads = min(self._threads, len(steps)) if self._domains.has_items else 0
        read = self._read_items if threads else lambda _: {}
        return read_ahead(map(self._plan.rows, steps), read, threads)

    def _read_items(self, rows: Rows) -> dict[int, Images]:
        """Read images that are items; arrays are read when the batch is made, on their device."""
        with torch.no_grad():  # a thread has a mode of its own
            return {
                code: self._domains.read(condition, rows.index[rows.which == code])
                for code, condition in enumerate(rows.conditions)
                if not self._domains.source(condition).in_memory
            }

    def _batch(
        self, rows: Rows, read: dict[int, Images], turn: Turn, recent: deque[Tensor]
    ) -> Batch:
        images = self._images(rows, read)
        names = [c.domain for c in rows.conditions]
        levels = [c.severity for c in rows.conditions]
        window = None
        if self._window is not None:
            if rows.since_reset == 0:
                recent.clear()
            recent.append(images)
            window = concatenate(list(recent))
        return Batch(
            images=images,
            labels=torch.from_numpy(self._labels(rows)),
            domain=names[0] if len(set(names)) == 1 else MIXED,
            severity=levels[0] if len(set(levels)) == 1 else math.nan,
            index=torch.from_numpy(rows.index.copy()),
            step=rows.step,
            domains=tuple(names[i] for i in rows.which),
            severities=tuple(levels[i] for i in rows.which),
            reset=rows.reset,
            late=turn.late,
            adapt=turn.learns,
            visit=rows.visit,
            window=window,
            latency=turn.latency,
        )

    def _labels(self, rows: Rows) -> Ints:
        labels = np.empty(len(rows.index), dtype=np.int64)
        for code, condition in enumerate(rows.conditions):
            mask = rows.which == code
            labels[mask] = self._domains.source(condition).labels[rows.index[mask]]
        return labels

    def _images(self, rows: Rows, read: dict[int, Images]) -> Tensor:
        """Make the images of a batch, with one call of the transform for each condition.

        Args:
            rows: The batch.
            read: Images that were read ahead, by number of the condition; emptied.
        """
        made, places = [], []
        for code, condition in enumerate(rows.conditions):
            place = np.flatnonzero(rows.which == code)
            # Named by domain, severity and step, so that no skipped batch changes it.
            key = [float(x) if not isinstance(x, str) else x for s in condition.steps for x in s]
            seed = partial(_pixel_seed, self._config["seed"], *key, rows.step)
            images = read.pop(code, None)
            if images is None:
                images = self._domains.read(condition, rows.index[place])
            made.append(self._domains.render(condition, images, seed))
            places.append(place)
        if len(made) == 1:
            return made[0]
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        return concatenate(made).index_select(0, back.to(made[0].device))


def _pixel_seed(seed: int, *key: str | float) -> int:
    """The seed of the generator that a transform of some images of one batch is given."""
    return Draws(seed, "pixels", *key).seed()
