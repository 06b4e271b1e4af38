"""Rows as they were before a call wrote to them, of buffers that are too large to be copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Journal"]


class Journal:
    """What a call has written row by row, so that it can be taken back.

    A component that names a buffer in ``kept_by_rows`` calls :meth:`keep` before it writes there.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Any, Tensor]] = []

    def keep(self, buffer: Tensor, rows: Any) -> None:
        """Remember rows of a buffer, which are about to be written to.

        Args:
            buffer: (N, ...).
            rows: What ``buffer[rows]`` takes.
        """
        self._kept.append((buffer, rows, buffer[rows].clone()))

    def clear(self) -> None:
        """Forget what was kept, since the call has succeeded or is about to begin."""
        self._kept.clear()

    @torch.no_grad()
    def take_back(self) -> None:
        """Put all rows back, the last ones first."""
        while self._kept:
            buffer, rows, values = self._kept[-1]
            buffer[rows] = values
            self._kept.pop()  # after that, so that an interrupted undoing can go on

    def __reduce__(self) -> Any:
        return Journal, ()
