"""Batches read ahead by threads, where a dataset decodes files.

Threads, since decoders of images leave the interpreter to others while they work, and processes
would need shared memory, datasets that can be sent to them, and someone to end them. Only reading
is done ahead: transforms and their draws stay with the stream, so that images are the same bit for
bit and transforms may be on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from threading import Barrier, BrokenBarrierError, Lock
from typing import TypeVar

import torch

__all__ = ["read_ahead"]

Asked = TypeVar("Asked")
Found = TypeVar("Found")

_making = Lock()  # torch's number of threads is another one meanwhile


def read_ahead(
    batches: Iterable[Asked], read: Callable[[Asked], Found], threads: int
) -> Iterator[tuple[Asked, Found]]:
    """Read batches in order, the next ones meanwhile in threads.

    Args:
        batches: What to read.
        read: Reads one batch; called by several threads at once.
        threads: Batches read at once; 0 to read each when it is asked for.

    Yields:
        A batch and what `read` returned for it; what it raised is raised here.
    """
    if threads == 0:
        for batch in batches:
            yield batch, read(batch)
        return
    left = iter(batches)
    waiting: deque[tuple[Asked, Future[Found]]] = deque()
    pool = _make_pool(threads)

    def ask(count: int) -> None:
        for batch in islice(left, count):
            waiting.append((batch, pool.submit(read, batch)))

    try:
        ask(threads + 1)
        while waiting:
            batch, future = waiting.popleft()
            found = future.result()
            del future  # it would hold what the caller may let go of
            yield batch, found
            ask(1)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _make_pool(threads: int) -> ThreadPoolExecutor:
    """Threads in each of which torch has one thread: they are many enough themselves."""
    all_started = Barrier(threads + 1)

    def start_single() -> None:
        torch.set_num_threads(1)
        with suppress(BrokenBarrierError):
            all_started.wait()

    with _making:
        before = torch.get_num_threads()
        pool = ThreadPoolExecutor(threads, "reader", start_single)
        try:
            for _ in range(threads):
                pool.submit(int)  # starts a thread, as long as those that are there are waiting
            all_started.wait()
        except BaseException:
            all_started.abort()
            pool.shutdown(cancel_futures=True)  # and wait: a late start would set 1 once more
            raise
        finally:
            torch.set_num_threads(before)  # it is also what threads that others start will have
    return pool
