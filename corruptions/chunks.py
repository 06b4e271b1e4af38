"""Split batches into parts whose temporaries fit the cache, and run them on idle cores.

torch splits an operation between threads, which wait for each other at its end. Where another
program keeps a core busy, such a wait lasts until that core is given back, and an operation of
microseconds takes milliseconds: then one thread is several times faster than two. So each thread
takes parts of the batch here, and only as many threads run as there are idle cores.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

__all__ = ["in_parts", "part_size", "usable_cores"]

# Temporaries of this many pixels fit the processor cache, or a GPU's memory.
_PIXELS = 1 << 18
_PIXELS_GPU = 1 << 23
# Factors for corruptions with more temporaries, or of a wider type, and for those with few.
_SHARES: dict[str, float] = {
    **dict.fromkeys(("zoom_blur", "glass_blur", "gaussian_blur"), 0.5),
    **dict.fromkeys(("shot_noise", "frost", "brightness", "contrast", "snow", "spatter"), 2),
}
# A thread is not woken for less than one part divided by this.
_LEAST = 2
# Seconds for which a measurement of the load by other processes is taken as current.
_LOAD_LASTS = 0.05

_load = {"at": -1.0, "busy": 0.0}


def part_size(name: str, images: torch.Tensor) -> int:
    """Number of images to work on at once, at least 1; no result depends on it.

    Args:
        name: The corruption.
        images: (B, C, H, W).
    """
    pixels = images.shape[2] * images.shape[3]
    if images.device.type != "cpu":
        return max(1, _PIXELS_GPU // pixels)
    return max(1, int(_PIXELS * _SHARES.get(name, 1)) // pixels)


def in_parts(work: Callable[[slice], None], count: int, part: int, device: torch.device) -> None:
    """Call `work` on slices that cover a batch, on as many threads as there are idle cores.

    Each thread does whole parts, and torch has one thread in each: operations on a part are short,
    and threads within an operation would wait for each other at the end of every one. A GPU gets
    one part after the other, from the caller's thread and so in its stream.

    Args:
        work: Called with a slice of rows; calls do not depend on each other.
        count: Rows of the batch.
        part: Rows to work on at once.
        device: Where the batch is.
    """
    idle = _idle_cores()
    threads = 1
    if device.type == "cpu":
        threads = min(idle, -(-count // max(1, part // _LEAST)))
    if threads > 1:
        # Equally many parts for each thread, all of about one size.
        part = -(-count // (threads * -(-count // (threads * part))))
    rows = iter([slice(first, first + part) for first in range(0, count, part)])
    inference = torch.is_inference_mode_enabled()

    def take() -> None:
        with torch.inference_mode(inference):  # a thread has a mode of its own
            for each in rows:
                work(each)

    with _torch_threads(1 if threads > 1 else idle):
        if threads == 1:
            take()
            return
        for done in [_pool(os.getpid()).submit(take) for _ in range(threads)]:
            done.result()  # raises what a part raised


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads that stay, since new ones are slow at first; a forked process has none of them.

    They first use torch within `_torch_threads(1)`, and keep that number.
    """
    return ThreadPoolExecutor(usable_cores(), "corruptions")


def _idle_cores() -> int:
    """Cores that torch may use and nobody else does, at least one."""
    wanted = torch.get_num_threads()
    if wanted == 1:
        return 1
    # The load is that of the machine, of whose cores this process may have only some.
    idle = (os.cpu_count() or 1) - _busy_cores()
    return max(1, min(wanted, usable_cores(), idle))


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _busy_cores() -> int:
    """How many threads of other processes run or want to; 0 where the system does not say."""
    now = time.monotonic()
    if now - _load["at"] > _LOAD_LASTS:
        try:
            running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
            # One is this thread. Others of ours may be running while they wait for work.
            _load["busy"] = max(0, running - _own_running()) if running > 1 else 0
        except (OSError, ValueError, IndexError):
            _load["busy"] = 0
        _load["at"] = now
    return int(_load["busy"])


def _own_running() -> int:
    count = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            # The name before the state is in brackets and may hold anything.
            count += (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
        except (OSError, IndexError):  # it has ended meanwhile
            continue
    return count
