"""From sources to batches: threads that read, threads that decode, queues that keep the order."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tta.core.checks import shown, told
from tta.runtime.frames import Failure, Frame, Source

__all__ = ["LATE", "Arrived", "Batch", "Intake"]

log = logging.getLogger("tta.runtime")
LATE = ("wait", "skip", "drop")
CLOSING_S = 5.0
POLL_S = 0.05  # a source may become live at any time


@dataclass(eq=False)
class Arrived:
    """A frame that waits."""

    stream: str
    index: int
    source: str | None
    at: float  # of time.monotonic()
    reader: _Reader
    image: Future[Any]


@dataclass
class Batch:
    """Frames of one shape, in the order in which they came.

    Args:
        frames: Of one stream, or of several where streams are not kept apart.
        late: Whether too many waited, these among them, for this one to be learned from.
    """

    frames: list[Arrived]
    late: bool


class Intake:
    """Reads sources and gives batches.

    Args:
        parts: Sources, each of which is read in a thread.
        prepare: From what a frame holds to what has the shape (C, H, W) and the dtype of an image;
            raises for what is no image.
        batch_size: Images in a batch, at most.
        max_wait: Seconds that a frame of a live source waits for a batch to fill.
        workers: Threads that prepare.
        queue: Frames that wait, see ``late``.
        late: "wait" reads no more while that many wait. Else a batch is late while more wait;
            "skip" reads no more at twice as many, "drop" then drops the oldest.
        apart: Whether each stream has batches of its own.
    """

    def __init__(
        self,
        parts: list[Source],
        prepare: Callable[[Any], Any],
        *,
        batch_size: int,
        max_wait: float,
        workers: int,
        queue: int,
        late: str,
        apart: bool,
    ) -> None:
        self.batch_size, self.max_wait, self.late, self.apart = batch_size, max_wait, late, apart
        self.queue = queue
        self.counts = {"frames": 0, "learned": 0, "skipped": 0, "dropped": 0, "failed": 0}
        self.stopped = False
        self._prepare, self._workers = prepare, workers
        self._lock = threading.RLock()  # taken by itself: a signal could leave a Condition held
        self._changed = threading.Condition(self._lock)
        self._waiting: dict[str, deque[Arrived]] = {}  # by stream, or all under one name
        self._count = 0
        self._next: dict[str, int] = {}  # number of the next frame of each stream
        self._readers = [_Reader(self, part) for part in parts]
        self._pool: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """Start the threads."""
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="tta-decode")
        for reader in self._readers:
            reader.thread.start()

    def take(self) -> Batch | None:
        """The next batch, when there is one; None at the end."""
        with self._lock:
            while not self.stopped:
                now = time.monotonic()
                found, wait = self._due(now, ())
                if found is not None:
                    return found
                if self._count == 0 and all(reader.ended for reader in self._readers):
                    return None
                self._changed.wait(wait)
        return None

    def take_beside(self, batch: Batch, most: int) -> list[Batch]:
        """This batch, and those of other streams that may go now, without waiting for one.

        Args:
            batch: What :meth:`take` gave.
            most: Batches, at most.
        """
        found = [batch]
        with self._lock:
            while len(found) < most and not self.stopped:
                taken = [one.frames[0].stream for one in found]
                more, _ = self._due(time.monotonic(), taken)
                if more is None:
                    break
                found.append(more)
        return found

    def close(self) -> None:
        """End all threads that can be ended; one that a user's iterable holds ends with that."""
        with self._lock:
            self.stopped = True
            self._changed.notify_all()
        for reader in self._readers:
            reader.part.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        until = time.monotonic() + CLOSING_S
        for reader in self._readers:
            if reader.thread.ident is not None:
                reader.thread.join(max(0.0, until - time.monotonic()))

    def fail(self, stream: str, reason: str, frames: int = 1) -> None:
        """Count and log what went wrong."""
        with self._lock:
            self.counts["failed"] += frames
        log.warning("stream %s: %s", shown(stream, 60), reason)

    # For the threads that read

    def room(self) -> bool:
        """Wait until a reader may read on; False to end."""
        with self._lock:
            while not self.stopped and self._count >= self._limit():
                self._changed.wait()
            return not self.stopped

    def put(self, frame: Frame, reader: _Reader) -> bool:
        """Queue a frame that has arrived; False to end."""
        with self._lock:
            if self.stopped:
                return False
            assert self._pool is not None
            self.counts["frames"] += 1
            stream = frame.stream
            index = self._next.get(stream, 0) if frame.index is None else frame.index
            self._next[stream] = index + 1
            image = self._pool.submit(self._prepare, frame.image)
            arrived = Arrived(stream, index, frame.source, time.monotonic(), reader, image)
            self._waiting.setdefault(stream if self.apart else "", deque()).append(arrived)
            self._count += 1
            if self.late == "drop":
                while self._count > 2 * self._room():
                    self._drop_oldest()
        image.add_done_callback(lambda _: self.notify())
        return True

    def notify(self) -> None:
        """Wake up who waits for a change."""
        with self._lock:
            self._changed.notify_all()

    def _limit(self) -> float:
        """Frames from which on nobody reads."""
        if self.late == "drop":
            return float("inf")
        return self._room() if self.late == "wait" else 2 * self._room()

    def _room(self) -> int:
        """Frames that may wait: at least a batch of each stream, which must be able to fill."""
        return max(self.queue, self.batch_size * len(self._waiting))

    def _drop_oldest(self) -> None:
        line = min((w for w in self._waiting.values() if w), key=lambda w: w[0].at)
        line.popleft().image.cancel()
        self._count -= 1
        self.counts["dropped"] += 1

    # Batches

    def _due(self, now: float, but: Collection[str]) -> tuple[Batch | None, float]:
        """The batch that waits longest, if one may go; else how long to wait at most.

        Args:
            now: By ``time.monotonic``.
            but: Streams that are left out.
        """
        best = oldest = None
        wait = POLL_S
        settled = True  # nothing that has come is being decoded
        for name, line in self._waiting.items():
            ready, closed = self._ready(line)
            if not line or name in but:
                continue
            all_ready = ready == len(line)
            due = ready == self.batch_size or closed
            settled = settled and (all_ready or due)
            if not ready:
                continue
            first, last = line[0], line[-1]
            found = first.at, line, ready
            if all_ready and not due:
                due = last.reader.ended
                if last.reader.part.live:
                    patience = first.at + self.max_wait - now
                    # A reader that is not asking its source is about to bring more.
                    due = due or (patience <= 0 and all(r.asking or r.ended for r in self._readers))
                    wait = min(wait, max(patience, 0.001))
            if due and (best is None or found[0] < best[0]):
                best = found
            if oldest is None or found[0] < oldest[0]:
                oldest = found
        if best is None and settled and self._count >= self._limit():
            best = oldest  # no batch can fill, as nobody reads
        if best is None:
            return None, wait
        _, line, ready = best
        frames = [line.popleft() for _ in range(ready)]
        # With the batch itself: "skip" reads no more at twice the queue, and a queue of one batch
        # would never have more behind it.
        late = self.late != "wait" and self._count > self._room()
        self._count -= ready
        self._changed.notify_all()
        return Batch(frames, late), 0.0

    def _ready(self, line: deque[Arrived]) -> tuple[int, bool]:
        """How many at the head make a batch, and whether no further one fits; drops failed ones."""
        ready, shape = 0, None
        while ready < min(len(line), self.batch_size):
            image = line[ready].image
            if not image.done():
                return ready, False
            error = image.exception()
            if error is not None:
                failed = line[ready]
                del line[ready]
                self._count -= 1
                self._changed.notify_all()
                where = failed.source or f"frame {failed.index}"
                reason = told(error.__cause__ or error, 160)  # the error names its place as well
                self.fail(failed.stream, f"{told(where, 100)} cannot be used ({reason})")
                continue
            mine = image.result().shape, image.result().dtype
            if shape not in (None, mine):
                return ready, True
            shape = mine
            ready += 1
        return ready, False


class _Reader:
    """Reads one source in a thread."""

    def __init__(self, intake: Intake, part: Source) -> None:
        self.intake, self.part = intake, part
        self.asking = False  # the source for its next frame
        self.ended = False
        self.thread = threading.Thread(target=self._read, name="tta-source", daemon=True)

    def _read(self) -> None:
        items: Any = None
        try:
            items = iter(self.part)
            while self.intake.room():
                self.asking = True
                item = next(items, None)
                self.asking = False
                if item is None:
                    return
                if isinstance(item, Failure):
                    self.intake.fail(item.stream, item.reason)
                elif not self.intake.put(item, self):
                    return
        except Exception as error:
            self.intake.fail(
                getattr(self.part, "name", "source"),
                f"the source raised {type(error).__name__}: {told(error)}",
            )
        finally:
            if hasattr(items, "close"):
                items.close()
            self.ended, self.asking = True, False
            self.intake.notify()
