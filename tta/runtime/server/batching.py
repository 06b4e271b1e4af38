"""One thread that has the model: images of many requests in, batches out.

Images that come within ``max_wait`` seconds of the first one are one round, up to ``rows`` of each
stream: a stream that sends more than its share waits, and holds up no other. What else needs a
stream (reset, freeze, drop) is done by the same thread between two rounds, so that it never meets a
batch of that stream.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tta.runtime.server.limits import STOPPING, RefusedError

__all__ = ["Batcher", "Item"]

log = logging.getLogger("tta.runtime.server")


@dataclass(eq=False)
class Item:
    """One image that waits for its prediction.

    Args:
        stream: Whose it is.
        image: (1, ...), as the model takes it.
        create: Whether the stream is made if it is not there.
        arrived: When its request was whole, by ``time.monotonic``.
        thumbnail: A small JPEG of it; None where none is due.
        future: Gets the answer.
    """

    stream: str
    image: Tensor
    create: bool
    arrived: float
    thumbnail: bytes | None = None
    future: Future[dict[str, Any]] = field(default_factory=Future)


class Batcher:
    """Forms batches and serves them, in one thread of its own.

    Args:
        serve: Serves a round; must set each item's future.
        rows: Images of one stream in a round.
        max_wait: Seconds that an image waits for others, once the model is free.
        queue: Images that may wait.
    """

    def __init__(
        self, serve: Callable[[list[Item]], None], rows: int, max_wait: float, queue: int
    ) -> None:
        self._serve, self._rows, self._max_wait, self._queue = serve, rows, max_wait, queue
        self._items: deque[tuple[float, Item]] = deque()  # with the time of coming
        self._counts: Counter[str] = Counter()  # of each stream in it
        self._actions: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._lock = threading.RLock()  # taken by itself: a signal could leave a Condition held
        self._changed = threading.Condition(self._lock)
        self._stopping = False
        self._thread = threading.Thread(target=self._go_on, name="tta-server", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images that wait."""
        return len(self._items)

    @property
    def alive(self) -> bool:
        """Whether the thread is there."""
        return self._thread.is_alive()

    def submit(self, items: Sequence[Item]) -> None:
        """Let images wait for a round, side by side.

        Raises:
            RefusedError: When too many wait already, or after :meth:`stop`.
        """
        with self._lock:
            self._check()
            if self._items and len(self._items) + len(items) > self._queue:
                raise RefusedError(
                    429,
                    f"`queue` must have room, got {len(self._items)} images that wait already: "
                    "send fewer, or try again in a second.",
                    1.0,
                )
            now = time.monotonic()
            self._items.extend((now, item) for item in items)
            self._counts.update(item.stream for item in items)
            self._changed.notify_all()

    def run(self, action: Callable[[], Any]) -> Future[Any]:
        """Do something between two rounds.

        Raises:
            RefusedError: After :meth:`stop`.
        """
        future: Future[Any] = Future()
        with self._lock:
            self._check()
            self._actions.append((action, future))
            self._changed.notify_all()
        return future

    def stop(self) -> None:
        """Take nothing more, finish what waits, and end."""
        with self._lock:
            self._stopping = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check(self) -> None:
        if self._stopping or not self._thread.is_alive():
            raise RefusedError(503, STOPPING)

    def _go_on(self) -> None:
        while True:
            found = self._next()
            if found is None:
                return
            actions, items = found
            for action, future in actions:
                if future.set_running_or_notify_cancel():
                    _settle(future, action)
            # A request that was cancelled while it waited has no part in the round.
            items = [item for item in items if item.future.set_running_or_notify_cancel()]
            if not items:
                continue
            try:
                self._serve(items)
            except BaseException as error:
                log.exception("a round of %d images failed", len(items))
                for item in items:
                    if not item.future.done():
                        item.future.set_exception(error)

    def _next(self) -> tuple[list[Any], list[Item]] | None:
        """Wait for things to do; None when there is nothing more to come."""
        with self._lock:
            while True:
                self._drop_cancelled()
                if self._actions or self._due():
                    break
                if self._stopping:
                    return None
                due_at = self._items[0][0] + self._max_wait if self._items else None
                self._changed.wait(None if due_at is None else due_at - time.monotonic())
            actions = list(self._actions)
            self._actions.clear()
            return actions, self._taken() if self._due() else []

    def _due(self) -> bool:
        """Whether a round must begin."""
        if not self._items:
            return False
        late = time.monotonic() >= self._items[0][0] + self._max_wait
        return late or self._stopping or max(self._counts.values()) >= self._rows

    def _drop_cancelled(self) -> None:
        """Forget what was cancelled and would otherwise say when the next round begins."""
        while self._items and self._items[0][1].future.cancelled():
            name = self._items.popleft()[1].stream
            self._counts -= Counter([name])

    def _taken(self) -> list[Item]:
        """The first images of each stream; the others go on waiting, in their order."""
        taken: list[Item] = []
        count: Counter[str] = Counter()
        left: deque[tuple[float, Item]] = deque()
        for pair in self._items:
            name = pair[1].stream
            if count[name] < self._rows:
                count[name] += 1
                taken.append(pair[1])
            else:
                left.append(pair)
        self._items, self._counts = left, self._counts - count
        return taken


def _settle(future: Future[Any], action: Callable[[], Any]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:
        future.set_exception(error)
