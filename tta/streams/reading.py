"""Reading batches ahead in threads, for datasets that decode files.

Threads are enough, since decoders of images release the interpreter while they work. Processes
would need shared memory, datasets that can be sent to them, and someone to end them. Only reading
is done ahead. Transforms and their draws are left to the thread of the caller, so images are the
same bit for bit and transforms may work on a GPU.
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
    """Read batches in order; threads meanwhile read the next ones.

    Args:
        batches: The batches, as `read` takes them.
        read: Reads one batch; several threads call it at once.
        threads: Number of batches read at once; 0 to read each batch when it is asked for.

    Yields:
        A batch and what `read` returned for it; an exception of `read` is raised here.
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
    """Make threads in each of which torch uses one thread only, as there are several of them."""
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
