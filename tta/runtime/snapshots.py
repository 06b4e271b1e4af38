"""Snapshots in the background, while streams go on."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tta.runtime.stream_store import StreamStore

__all__ = ["Snapshots"]

log = logging.getLogger("tta.runtime")


class Snapshots:
    """Writes the streams of a store that have changed, twice in every interval.

    What is learned just after a stream was copied waits for the next round: half an interval, and
    the time that a round takes.

    Args:
        store: Not kept alive.
        interval: Seconds.
    """

    def __init__(self, store: StreamStore, interval: float) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=_go_on,
            args=(weakref.ref(store, lambda _: self._stopped.set()), self._stopped, interval),
            name="tta-snapshots",
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        """End, after the file that is being written."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _go_on(reference: weakref.ref[StreamStore], stopped: threading.Event, interval: float) -> None:
    wait = interval / 2
    while not stopped.wait(wait):
        store = reference()
        if store is None:
            return
        begun = time.monotonic()
        store.write_changed(stopped)
        del store  # it must be able to end while this waits
        seconds = time.monotonic() - begun
        if seconds > interval / 2:
            log.warning(
                "writing all streams took %.1f s, more than half the interval of %.1f s",
                seconds,
                interval,
            )
        wait = max(0.0, interval / 2 - seconds)
