"""What runs that follow each other have in common, kept so that it is made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Cache"]

Made = TypeVar("Made")


class Cache:
    """Keeps the last thing of each kind, for runs that follow each other with the same one."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Any, Any]] = {}

    def get(self, kind: str, key: Any, make: Callable[[], Made]) -> Made:
        """Return the thing of a kind for `key`, which is made unless `key` is the last one.

        Args:
            kind: What it is, such as "subject".
            key: All that decides what `make` returns.
            make: Makes it.
        """
        if kind not in self._held or self._held[kind][0] != key:
            self._held.pop(kind, None)  # before the next is made: both may be large
            self._held[kind] = key, make()
        return self._held[kind][1]
