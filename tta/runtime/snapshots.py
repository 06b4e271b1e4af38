"""Snapshots in the background, while streams go on."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING

from tta.runtime.background import Background

if TYPE_CHECKING:
    from tta.runtime.stream_store import StreamStore

__all__ = ["Snapshots"]

log = logging.getLogger("tta.runtime")


class Snapshots(Background):
    """Writes the streams of a store that have changed, twice in every interval.

    What is learned just after a stream was copied waits for the next round: half an interval, and
    the time that a round takes.

    Args:
        store: Not kept alive.
        interval: Seconds.
    """

    def __init__(self, store: StreamStore, interval: float) -> None:
        super().__init__(store, _go_on, "tta-snapshots", interval)


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
