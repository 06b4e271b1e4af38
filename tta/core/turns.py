"""Turns: calls of one object that wait for each other, from whatever thread."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["GuestError", "Turns", "guest", "in_turn"]

Method = TypeVar("Method", bound=Callable[..., Any])
_all: weakref.WeakSet[Turns] = weakref.WeakSet()
# Of a thread that works for the one who has the turn: `of`, the turns that it must not wait for.
guest = threading.local()


class GuestError(RuntimeError):
    """A thread asked for a turn that the one it works for has."""


class Turns:
    """A lock that a thread may take several times; ``with turns.lock: ...``.

    Copies of an object, and what is unpickled, have one of their own. A process that was forked
    while another thread had its turn begins with a free one.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.reserved = ""  # why nobody but the one who set this may have a turn
        self.admitted: int | None = None  # the thread to which that one has given it
        _all.add(self)

    def __deepcopy__(self, memo: Any) -> Turns:
        return Turns()

    def __reduce__(self) -> Any:
        return Turns, ()


def in_turn(method: Method) -> Method:
    """Make a method of an object that has ``turns`` wait for the other methods like it."""

    @functools.wraps(method)
    def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The lock itself, since a signal that raises comes between two lines of Python, such as
        # those of __enter__, and would leave it held.
        turns = self.turns
        if getattr(guest, "of", None) is turns:
            raise GuestError(turns.reserved)
        with turns.lock:
            if turns.reserved and turns.admitted is None:
                raise RuntimeError(turns.reserved)
            return method(self, *args, **kwargs)

    return wait  # type: ignore[return-value]


def _free_all() -> None:
    for turns in _all:
        turns.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all)
