"""Streams that other processes ask for are handed over in the background."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING

from tta.core.checks import told
from tta.runtime.background import Background
from tta.runtime.owners import POLL, Owners

if TYPE_CHECKING:
    from tta.runtime.stream_store import StreamStore

__all__ = ["HandOver"]

log = logging.getLogger("tta.runtime")


class HandOver(Background):
    """Gives streams to processes that ask for them, between two uses.

    Args:
        store: Not kept alive.
        owners: Of its folder.
    """

    def __init__(self, store: StreamStore, owners: Owners) -> None:
        super().__init__(store, _go_on, "tta-hand-over", owners)


def _go_on(reference: weakref.ref[StreamStore], stopped: threading.Event, owners: Owners) -> None:
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
