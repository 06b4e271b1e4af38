"""Messages go out one after the other, in a thread or at once, and failures are kept apart."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from tta.core.checks import LARGE, LARGEST, number, told, whole_number
from tta.runtime.cloud.uplink import Uplink, UplinkError
from tta.runtime.cloud.wire import MessageError

__all__ = ["Sender"]

log = logging.getLogger("tta.runtime.cloud")
LONGEST_SILENCE = 60.0  # seconds between attempts to reach a cloud side that does not answer
STOP = (b"", 0)


class Sender:
    """Sends messages by an uplink; what fails is lost, and never raises.

    Args:
        uplink: Carries them.
        waits: Whether :meth:`hand_over` returns when the answer is there.
        backlog: Messages that may wait for the thread.
        retry: Seconds without attempts after a failure, doubled by each further one.
        take: Is given each answer that is not empty, and raises ``MessageError`` for a wrong one.
    """

    def __init__(
        self,
        uplink: Uplink,
        waits: bool,
        backlog: int,
        retry: float,
        take: Callable[[bytes], None],
    ) -> None:
        self.uplink, self.waits = uplink, waits
        self.counts = {"uploaded": 0, "lost": 0, "failures": 0}
        self.trouble: str | None = None  # why the last exchange failed
        self.clock: Callable[[], float] = time.monotonic
        self._take = take
        self._retry = number("retry", retry, 0, LARGE)
        self._silence, self._silent_until = self._retry, float("-inf")
        backlog = whole_number("backlog", backlog, 1, LARGEST)
        self._queue: queue.Queue[tuple[bytes, int]] = queue.Queue(backlog)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._lock = threading.Lock()  # of counts

    def hand_over(self, message: bytes, images: int) -> None:
        """Send a message with so many images, now or later, or lose it.

        Args:
            message: Its bytes.
            images: In it.
        """
        if self._closed or self.clock() < self._silent_until:
            self._count(lost=images)
        elif self.waits:
            self._send(message, images)
        else:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="tta-uplink")
                self._thread.start()
            try:
                self._queue.put_nowait((message, images))
            except queue.Full:
                self._count(lost=images)

    def flush(self, timeout: float) -> bool:
        """Wait until nothing waits any more; say whether that is so."""
        end = time.monotonic() + timeout
        while self._queue.unfinished_tasks:
            if time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True

    def close(self, timeout: float) -> None:
        """Lose what waits, and end the thread when its exchange is over."""
        self._closed = True
        if self._thread is None:
            return
        while True:
            try:
                self._count(lost=self._queue.get_nowait()[1])
                self._queue.task_done()
            except queue.Empty:
                break
        self._queue.put(STOP)
        self._thread.join(timeout)
        self._thread = None

    def _run(self) -> None:
        while True:
            message, images = self._queue.get()
            try:
                if (message, images) == STOP:
                    return
                if self._closed or self.clock() < self._silent_until:
                    self._count(lost=images)
                else:
                    self._send(message, images)
            finally:
                self._queue.task_done()

    def _send(self, message: bytes, images: int) -> None:
        try:
            answer = self.uplink.exchange(message)
            if answer:
                self._take(answer)
        except (UplinkError, MessageError) as error:
            self._fail(told(error, 250), images)
        except Exception as error:  # an uplink of the caller's
            log.exception("the uplink failed")
            self._fail(f"the uplink failed ({type(error).__name__}: {told(error, 150)})", images)
        else:
            if self.trouble is not None:
                log.info("the cloud side answers again")
            self.trouble, self._silence = None, self._retry
            self._count(uploaded=images)

    def _fail(self, text: str, images: int) -> None:
        self._silent_until = self.clock() + self._silence
        self._silence = min(LONGEST_SILENCE, 2 * self._silence)
        self._count(failures=1, lost=images)
        log.log(logging.DEBUG if self.trouble else logging.WARNING, "%s", text)
        self.trouble = text

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number_of in more.items():
                self.counts[name] += number_of
