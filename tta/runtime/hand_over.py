"""Streams that other processes ask for are handed over in the background."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING

from tta.core.checks import told
from tta.runtime.owners import POLL, Owners

if TYPE_CHECKING:
    from tta.runtime.stream_store import StreamStore

__all__ = ["HandOver"]

log = logging.getLogger("tta.runtime")


class HandOver:
    """Gives streams to processes that ask for them, between two uses.

    Args:
        store: Not kept alive.
        owners: Of its folder.
    """

    def __init__(self, store: StreamStore, owners: Owners) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=_go_on,
            args=(weakref.ref(store, lambda _: self._stopped.set()), owners, self._stopped),
            name="tta-hand-over",
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        """End, after what is being handed over."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _go_on(reference: weakref.ref[StreamStore], owners: Owners, stopped: threading.Event) -> None:
    while not stopped.wait(POLL):
        try:
            wanted = owners.wanted()
        except OSError as error:  # the file system is away; it may come back
            log.warning("wishes for streams cannot be read (%s)", told(error.strerror or error))
            stopped.wait(5)
            continue
        store = reference()
        if store is None:
            return
        for name in wanted:
            store.hand_over(name)
        del store  # it must be able to end while this waits
