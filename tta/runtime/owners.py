"""Which process has which stream of a folder that several serve at the same time.

A stream's owner holds a lock on one byte of ``owners.lock``, whose place follows from the stream's
name. The system frees it when the process ends, however that dies, so nobody has to tell a dead
owner from a slow one. Who wants a stream that another one has locks a second byte, its wish; the
owner finds it, writes the stream, and frees the first. Wishes are a queue of one place: whoever
stands in it is served before the former owner comes back.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from tta.core.checks import shown, told
from tta.core.files import NO_LINKS, not_writable

try:
    fcntl: Any = import_module("fcntl")
except ImportError:  # no such system is one that pools can share a folder on
    fcntl = None

__all__ = ["POLL", "ElsewhereError", "Owners", "making"]

FILE = "owners.lock"
WISHES = 1 << 62  # the byte from which on wishes are; before it, owners
MAKING = WISHES - 1  # of who makes the pool in an empty folder
FLOCK = "hhqqi4x"  # struct flock of Linux on 64 bits: type, whence, start, length, process
POLL = 0.2  # seconds between two looks, for a wish or for its fulfilment
PATIENCE = 2.0  # seconds that a wish stands without being repeated


class ElsewhereError(RuntimeError):
    """A stream is another process's, which was asked to give it back."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"`stream` {shown(name, 60)} must be free, but another process has it, and was asked "
            "to give it back: try again in a moment, and send each stream to one process."
        )


class Owners:
    """The streams of a folder that this process owns. Safe to call from several threads.

    Args:
        folder: The pool's; made if it does not exist.

    Raises:
        OSError: When the file cannot be made there, or the file system has no such locks.
    """

    def __init__(self, folder: Path) -> None:
        if not hasattr(fcntl, "F_OFD_SETLK"):
            raise OSError(errno.ENOTSUP, _REFUSAL.format("this system has none"))
        self._mine: dict[str, int] = {}  # the place of each
        self._wishes: dict[str, float] = {}  # when each was made, or repeated
        self._lock = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | NO_LINKS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(folder / FILE, flags, 0o666)
        except OSError as error:
            raise not_writable("folder", folder, error) from error
        self._end = weakref.finalize(self, os.close, self._handle)
        _all.add(self)
        try:
            self._is_wished(0, 1)
        except OSError as error:
            self.close()
            raise type(error)(
                error.errno, _REFUSAL.format(told(error.strerror or error))
            ) from error

    def claim(self, name: str) -> bool:
        """Own a stream, or ask whoever does to give it back; True where it is this process's."""
        with self._lock:
            if name in self._mine:
                return True
            place = _place(name)
            if not self._take(WISHES + place):  # somebody else was here before
                return False
            if not self._take(place):
                self._wishes[name] = time.monotonic()
                return False
            self._mine[name] = place
            self._withdraw(name, place)
            return True

    def give(self, name: str) -> None:
        """Give a stream back, so that another process may own it."""
        with self._lock:
            place = self._mine.pop(name, None)
            if place is not None:
                self._set(fcntl.F_UNLCK, place)

    def wanted(self) -> list[str]:
        """Streams of this process that another one asks for; its own old wishes are withdrawn."""
        with self._lock:
            for name, at in list(self._wishes.items()):
                if time.monotonic() > at + PATIENCE:
                    self._withdraw(name, _place(name))
            if not self._is_wished(0, 0):
                return []
            return [name for name, place in self._mine.items() if self._is_wished(place, 1)]

    def close(self) -> None:
        """Give all streams back."""
        with self._lock:
            self._mine.clear()
            self._wishes.clear()
            self._end()  # with its last handle, a file's locks go

    def __contains__(self, name: object) -> bool:
        return name in self._mine

    def _withdraw(self, name: str, place: int) -> None:
        self._wishes.pop(name, None)
        self._set(fcntl.F_UNLCK, WISHES + place)

    def _take(self, place: int) -> bool:
        try:
            self._set(fcntl.F_WRLCK, place)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # which of them, depends on the system
                return False
            raise
        return True

    def _set(self, kind: int, place: int) -> None:
        # Locks of the open file, not of the process: those of a process go as soon as it closes
        # any other handle of the file, and two pools of one process would have no locks at all.
        fcntl.fcntl(self._open(), fcntl.F_OFD_SETLK, struct.pack(FLOCK, kind, 0, place, 1, 0))

    def _is_wished(self, place: int, length: int) -> bool:
        """Whether others wish for what is at a place; for anything, where ``length`` is 0."""
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, 0, WISHES + place, length, 0)
        found = fcntl.fcntl(self._open(), fcntl.F_OFD_GETLK, asked)
        return struct.unpack(FLOCK, found)[0] != fcntl.F_UNLCK

    def _open(self) -> int:
        if not self._end.alive:  # its number may be that of another file by now
            raise OSError(errno.EBADF, "this process gave all streams back")
        return self._handle


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Keep other processes from making a pool in a folder within the block.

    Raises:
        OSError: As :class:`Owners`.
    """
    owners = Owners(folder)
    try:
        while not owners._take(MAKING):
            time.sleep(0.05)
        yield
    finally:
        owners.close()


_REFUSAL = (
    "`folder` must be on a file system with locks for a pool that shares it, but {}: choose "
    "another folder, or let one process alone serve it."
)
_all: weakref.WeakSet[Owners] = weakref.WeakSet()


def _close_in_child() -> None:
    """Let a forked process drop its handles, or its parent's streams would live on with it."""
    for owners in list(_all):
        with suppress(OSError):
            owners._end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _place(name: str) -> int:
    """The byte of a stream's owner: 61 bits of a hash, so that two never meet."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") >> 3
