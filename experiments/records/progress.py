"""Progress while a run works: a bar on a terminal, sparse lines in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

__all__ = ["Progress"]


class Progress:
    """Says what is being done, how well, how fast, and how long it will take.

    On a terminal it is a bar of tqdm; elsewhere a line is printed at the start and then every
    `every` seconds. Lines that stay (`say`) go above the bar.

    Args:
        total: Work of the whole run, in any unit; `advance` counts in the same unit.
        quiet: Show nothing.
        stream: Where to; default standard output.
        every: Seconds between lines where the output is no terminal.
    """

    def __init__(
        self,
        total: float,
        quiet: bool = False,
        stream: TextIO | None = None,
        every: float = 15.0,
    ) -> None:
        self._out = sys.stdout if stream is None else stream
        self._quiet = quiet
        self._total = total
        self._bar: tqdm | None = None
        self._as_bar = self._out.isatty() and not quiet
        self._every = every
        self._start = time.monotonic()
        self._last = -float("inf")
        self._done = 0.0

    @property
    def total(self) -> float:
        """Work of the whole run, less what was done before."""
        return self._total

    @total.setter
    def total(self, work: float) -> None:
        self._total = work
        if self._bar is not None:
            self._bar.total = work

    def advance(self, work: float, text: str) -> None:
        """Count `work` as done and maybe show `text`."""
        new = self._bar is None
        bar = self._shown_bar() if self._as_bar else None
        self._done += work
        if bar is not None:
            bar.set_description_str(text, refresh=False)
            bar.update(work)  # redraws a few times a second
            if new:
                bar.refresh()
        elif not self._quiet and time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._print(f"{text}  {self.left()}")

    def skip(self, work: float) -> None:
        """Leave out `work` that was done before."""
        self.total -= work

    def note(self, text: str) -> None:
        """Show `text` now on a terminal; elsewhere it is not worth a line."""
        if self._as_bar:
            self._shown_bar().set_description_str(text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self._quiet:
            self._print(text)

    def left(self) -> str:
        """Time left in words, at the speed so far."""
        if self._done <= 0:
            return "time left unknown"
        seconds = (time.monotonic() - self._start) * max(self.total / self._done - 1, 0)
        return f"{tqdm.format_interval(seconds)} left"

    def clear(self) -> None:
        """Remove the bar; the next `advance` or `note` shows it again."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str) -> None:
        # tqdm takes its bars away before it writes, and puts them back below.
        tqdm.write(text, file=self._out)
        self._out.flush()

    def _shown_bar(self) -> tqdm:
        if self._bar is None:
            self._bar = tqdm(
                total=self.total,
                initial=self._done,
                file=self._out,
                bar_format="{desc}  {percentage:3.0f} % |{bar:20}| {remaining} left",
                dynamic_ncols=True,
                leave=False,
            )
        return self._bar
