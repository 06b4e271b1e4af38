"""Memory that passes free stays with the process, where the C library can be told so.

A backward pass allocates and frees hundreds of megabytes. glibc gives large blocks back to the
system at once and asks for them again in the next call, where each page of 4 KiB costs an interrupt
and is filled with zeros: at 224 pixels and 8 images a fifth to a third of a step. In other threads
than the main one it does so more often, since their memory comes in pieces of 64 MiB.

See mallopt(3). What is said here holds for the whole process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["as_before", "give_back_freed_memory", "keep_freed_memory"]

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # M_... of malloc.h
LARGEST = 2**31 - 1  # bytes: of blocks that are kept, and that may be free at the end
# To where glibc's own thresholds rise by and by in a process that frees large blocks.
USUAL_MMAP, USUAL_TRIM = 32 * 2**20, 64 * 2**20
_keeps = False  # whether this process was told to


def keep_freed_memory() -> bool:
    """Keep what is freed from now on for later allocations of this process.

    Threads that begin after that share the main thread's memory.

    Returns:
        Whether this is possible here: with glibc.
    """
    global _keeps
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    _keeps = True
    wishes = ((MMAP_THRESHOLD, 2**30), (TRIM_THRESHOLD, LARGEST), (ARENA_MAX, 1))
    return all([mallopt(*wish) == 1 for wish in wishes])


def give_back_freed_memory() -> None:
    """Give back what is free, and from now on about as glibc does by itself."""
    global _keeps
    _keeps = False
    mallopt, trim = _function("mallopt"), _function("malloc_trim")
    if mallopt is not None and trim is not None:
        mallopt(MMAP_THRESHOLD, USUAL_MMAP)
        mallopt(TRIM_THRESHOLD, USUAL_TRIM)
        trim(0)


@contextmanager
def as_before() -> Iterator[None]:
    """After the block, freed memory is given back, unless it was kept before."""
    before = _keeps
    try:
        yield
    finally:
        if _keeps and not before:
            give_back_freed_memory()


def _function(name: str) -> Callable[..., int] | None:
    """A function of the C library that this process has loaded."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another library, or another system
        return None
    return found
