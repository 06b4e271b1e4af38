"""Progress while a run works: one line that renews itself, or sparse lines in a log."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

__all__ = ["Progress"]


class Progress:
    """Says what is being done, how well, how fast, and how long it will take.

    On a terminal one line is rewritten; elsewhere a line is printed at the start of every method
    and then every `every` seconds.

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
        self.total = total
        self.quiet = quiet
        self._out = sys.stdout if stream is None else stream
        self._terminal = self._out.isatty()
        self._every = 0.1 if self._terminal else every
        self._start = time.monotonic()
        self._last = -float("inf")
        self._done = 0.0
        self._shown = False

    def advance(self, work: float, text: str) -> None:
        """Count `work` as done and maybe show `text`."""
        self._done += work
        if time.monotonic() - self._last >= self._every:
            self._show(f"{text}  {self.left()}")

    def skip(self, work: float) -> None:
        """Leave out `work` that was done before."""
        self.total -= work

    def note(self, text: str) -> None:
        """Show `text` now on a terminal; elsewhere it is not worth a line."""
        if self._terminal:
            self._show(text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        if not self.quiet:
            print(text, file=self._out, flush=True)

    def left(self) -> str:
        """Time left in words, at the speed so far."""
        if self._done <= 0:
            return "time left unknown"
        seconds = (time.monotonic() - self._start) * max(self.total / self._done - 1, 0)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"

    def clear(self) -> None:
        """Remove the line that renews itself."""
        if self._shown and self._terminal:
            self._out.write("\r\x1b[K")
            self._out.flush()
        self._shown = False

    def _show(self, text: str) -> None:
        self._last = time.monotonic()
        if self.quiet:
            return
        if self._terminal:
            width = shutil.get_terminal_size().columns
            self._out.write("\r\x1b[K" + text[: width - 1])
            self._shown = True
        else:
            self._out.write(text + "\n")
        self._out.flush()
