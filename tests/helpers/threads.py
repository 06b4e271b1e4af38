"""Threads of the library's own that must not outlive what started them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["no_thread_left"]


@contextmanager
def no_thread_left(within: float = 0.0) -> Iterator[None]:
    """Fail where a thread that the block started is there so many seconds after its end."""
    before = set(threading.enumerate())
    yield
    end = time.monotonic() + within
    while left := [t for t in set(threading.enumerate()) - before if t.name.startswith("tta-")]:
        assert time.monotonic() < end, left
        time.sleep(0.01)
