"""What happens, told to all who listen; slow listeners lose the oldest and are told how many."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from tta.runtime.server.limits import RefusedError

__all__ = ["Events"]

KEPT = 1000  # events other than health, for who listens later
WAITING = 256  # events of one listener
HEARTBEAT_S = 10.0  # a comment in between, so that a connection that died is found


class Events:
    """A hub: :meth:`publish` from any thread, :meth:`listen` in the server's loop.

    Args:
        listeners: At most so many at a time.
    """

    def __init__(self, listeners: int) -> None:
        self._most = listeners
        self._kept: deque[tuple[int, str]] = deque(maxlen=KEPT)
        self._number = 0
        self._lock = threading.Lock()
        self._listeners: dict[_Listener, asyncio.AbstractEventLoop] = {}

    @property
    def listening(self) -> int:
        """Listeners at the moment."""
        return len(self._listeners)

    def publish(self, kind: str, data: dict[str, Any], keep: bool = True) -> None:
        """Tell all listeners.

        Args:
            kind: Such as "guard" or "health".
            data: What JSON can hold.
            keep: Whether those who come later are told too.
        """
        with self._lock:
            if not keep and not self._listeners:
                return
            text = f"event: {kind}\ndata: {json.dumps(data)}\n\n"
            if keep:
                self._number += 1
                text = f"id: {self._number}\n{text}"
                self._kept.append((self._number, text))
            for listener, loop in list(self._listeners.items()):
                with suppress(RuntimeError):  # its loop has ended
                    loop.call_soon_threadsafe(listener.put, text)

    def close(self) -> None:
        """End all listening."""
        with self._lock:
            for listener, loop in list(self._listeners.items()):
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(listener.put, None)
            self._most = 0

    def enter(self, after: int | None) -> _Listener:
        """Begin to listen.

        Args:
            after: The number of the last event that was heard; None for what is new alone.

        Raises:
            RefusedError: When there are too many listeners.
        """
        with self._lock:
            if len(self._listeners) >= self._most:
                raise RefusedError(
                    429,
                    f"`events` must have at most {self._most} listeners, and has them: end one, "
                    "or try again later.",
                    10.0,
                )
            listener = _Listener()
            if after is not None:
                for number, text in self._kept:
                    if number > after:
                        listener.put(text)
            self._listeners[listener] = asyncio.get_running_loop()
            return listener

    async def listen(self, listener: _Listener) -> AsyncIterator[str]:
        """The text of a stream of server-sent events, until :meth:`close`."""
        try:
            yield "retry: 2000\n\n"
            while True:
                try:
                    text = await asyncio.wait_for(listener.get(), HEARTBEAT_S)
                except asyncio.TimeoutError:
                    text = ": alive\n\n"
                if text is None:
                    return
                yield text
        finally:
            self.leave(listener)

    def leave(self, listener: _Listener) -> None:
        """Listen no more."""
        with self._lock:
            self._listeners.pop(listener, None)


class _Listener:
    """A queue that forgets the oldest."""

    def __init__(self) -> None:
        self._texts: deque[str | None] = deque()
        self._some = asyncio.Event()
        self._lost = 0

    def put(self, text: str | None) -> None:
        if len(self._texts) >= WAITING:
            self._texts.popleft()
            self._lost += 1
        self._texts.append(text)
        self._some.set()

    def take(self) -> list[str]:
        """What is there, without waiting for more."""
        texts = [text for text in self._texts if text is not None]
        self._texts.clear()
        return texts

    async def get(self) -> str | None:
        if self._lost:
            lost, self._lost = self._lost, 0
            return f"event: lost\ndata: {json.dumps({'events': lost})}\n\n"
        while not self._texts:
            self._some.clear()
            await self._some.wait()
        return self._texts.popleft()
