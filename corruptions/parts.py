"""Batches in parts whose temporaries fit the cache, on as many threads as there are idle cores.

torch splits an operation between threads, which wait for each other at its end. Where another
program keeps a core busy, such a wait lasts until that core is given back, and an operation of
microseconds takes milliseconds: then one thread is several times faster than two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["part_size", "threads_for_idle_cores", "usable_cores"]

# Temporaries of this many pixels fit the processor cache, or a GPU's memory.
_PIXELS = 1 << 18
_PIXELS_GPU = 1 << 23
# Some have more of them, or of a wider type; a codec has none, and threads that want a share each.
_SHARES = dict.fromkeys(
    ("shot_noise", "glass_blur", "elastic_transform", "saturate", "pixelate"), 0.5
) | {"jpeg_compression": 8}
# Seconds between looks at what else is running.
_GLANCE = 0.05

_looked = {"at": -1.0, "busy": 0.0}


def part_size(name: str, images: torch.Tensor) -> int:
    """Images to work on at once, at least 1; never what decides a result.

    Args:
        name: Of a corruption.
        images: (B, C, H, W).
    """
    pixels = images.shape[2] * images.shape[3]
    if images.device.type != "cpu":
        return max(1, _PIXELS_GPU // pixels)
    return max(1, int(_PIXELS * _SHARES.get(name, 1)) // pixels)


@contextmanager
def threads_for_idle_cores() -> Iterator[None]:
    """Let torch use no more threads than there are cores that nobody else uses; at least one."""
    wanted = torch.get_num_threads()
    threads = wanted
    if wanted > 1:
        # What runs is told of the whole machine, of which this process may have a part.
        idle = (os.cpu_count() or 1) - _busy_cores()
        threads = max(1, min(wanted, usable_cores(), idle))
    if threads == wanted:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(wanted)


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _busy_cores() -> int:
    """How many threads of other processes run or want to; 0 where the system does not say."""
    now = time.monotonic()
    if now - _looked["at"] > _GLANCE:
        try:
            running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
            # One is this thread. Others of ours may be running while they wait for work.
            _looked["busy"] = max(0, running - _own_running()) if running > 1 else 0
        except (OSError, ValueError, IndexError):
            _looked["busy"] = 0
        _looked["at"] = now
    return int(_looked["busy"])


def _own_running() -> int:
    count = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            # The name before the state is in brackets and may hold anything.
            count += (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
        except (OSError, IndexError):  # it has ended meanwhile
            continue
    return count
