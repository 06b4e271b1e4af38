"""Which thread has which stream of a pool."""

from __future__ import annotations

import threading

from tta.core.checks import shown
from tta.runtime.stream_store import Stream, StreamStore

__all__ = ["Ownership"]


class Ownership:
    """Gives each stream to one owner at a time; others wait, or are refused.

    Args:
        store: Of the streams.
    """

    def __init__(self, store: StreamStore) -> None:
        self._store = store
        # Held by `with` of the lock itself: a signal that raises comes between two lines of Python,
        # such as those of Condition.__enter__, and would leave it held.
        self._lock = threading.RLock()
        self._free = threading.Condition(self._lock)

    def begin(self, stream: Stream, view: object, wait: bool) -> None:
        """Make a view, in this thread, the owner of a stream.

        Raises:
            RuntimeError: When the stream has another owner and ``wait`` is False, this thread owns
                it already, or the pool is closed.
            KeyError: When the stream was dropped meanwhile.
        """
        me = threading.get_ident()
        self._begin_here(stream, view, wait, me)
        try:
            self._store.claim(stream, wait)  # among processes
            self._store.check_there(stream)  # it may have been dropped meanwhile
        except BaseException:
            self.end(stream, view)
            raise

    def end(self, stream: Stream, view: object) -> None:
        """End the ownership of a view, if it has it."""
        with self._lock:
            if stream.owner is not None and stream.owner[0] == id(view):
                stream.owner = None
                self._free.notify_all()

    def tell(self) -> None:
        """Let those who wait look again, since the pool is closed."""
        with self._lock:
            self._free.notify_all()

    def _begin_here(self, stream: Stream, view: object, wait: bool, me: int) -> None:
        """As :meth:`begin`, among the threads of this process."""
        with self._lock:
            while stream.owner is not None:
                if not wait or stream.owner[1] == me:
                    who = "this thread" if stream.owner[1] == me else "another owner"
                    raise RuntimeError(
                        f"`stream` {shown(stream.name, 60)} must be free, but {who} has it: leave "
                        "its with block first, or pass wait=True to wait for another thread."
                    )
                self._free.wait()
                self._store.check_open()
            stream.owner = id(view), me
