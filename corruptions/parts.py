"""Batches in parts: temporaries that fit the cache, and one part for each thread at a time.

A part's operations are short, so that splitting each of them between threads costs more than it
gives: threads take whole parts instead.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["each_part", "part_size"]

# Temporaries of this many pixels fit the processor cache, or a GPU's memory.
_PIXELS = 1 << 17
_PIXELS_GPU = 1 << 22
# Fewer are not worth a thread of their own.
_FEWEST = 1 << 14


def part_size(images: torch.Tensor) -> int:
    """Images to work on at once, at least 1; never what decides a result.

    Args:
        images: (B, C, H, W).
    """
    pixels = images.shape[2] * images.shape[3]
    if images.device.type != "cpu":
        return max(1, _PIXELS_GPU // pixels)
    share = -(-len(images) // torch.get_num_threads())
    return max(1, min(_PIXELS // pixels, max(share, _FEWEST // pixels)))


def each_part(work: Callable[[slice], None], count: int, part: int, *, threads: int) -> None:
    """Call `work` with slices that cover `count` images, `part` images each.

    Args:
        work: Writes its own rows of the result.
        count: Images in all.
        part: Images at once.
        threads: How many parts to work on at the same time.
    """
    slices = [slice(first, first + part) for first in range(0, count, part)]
    threads = min(threads, len(slices))
    if threads <= 1:
        for rows in slices:
            work(rows)
        return
    before = torch.get_num_threads()
    # The number of threads is a thread's own setting in torch, but a new thread takes over the
    # last one set anywhere, hence the second call.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = [pool.submit(work, rows) for rows in slices]
        torch.set_num_threads(before)
        for future in done:
            future.result()
    torch.set_num_threads(before)
