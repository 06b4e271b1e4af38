"""A thread that works for a store of streams for as long as that is there."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta.runtime.stream_store import StreamStore

__all__ = ["Background"]


class Background:
    """Runs a function beside the pool until it is told to end.

    Args:
        store: Not kept alive; when it ends, the function is told to.
        work: Called with a weak reference to the store, the event that tells it to end, and
            ``arguments``.
        name: Of the thread.
        *arguments: Further ones.
    """

    def __init__(
        self, store: StreamStore, work: Callable[..., None], name: str, *arguments: Any
    ) -> None:
        self._stopped = threading.Event()
        reference = weakref.ref(store, lambda _: self._stopped.set())
        self._thread = threading.Thread(
            target=work, args=(reference, self._stopped, *arguments), name=name, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End, after what is being done."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
