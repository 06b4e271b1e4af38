"""Source batches by position, for methods that go on reading source data while they adapt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from tta.core.source import preserving_rng

__all__ = ["Replay"]

Batch = tuple[Tensor, Tensor]


class Replay:
    """Source batches in the order given, wrapping around.

    A list or tuple is read at any position. Anything else, such as a data loader, is read in
    passes: going back starts a new pass and skips batches, and so does a copy of the object.

    Args:
        batches: Pairs of images and labels.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches
        self._reader: Iterator[Batch] | None = None
        self._at = 0  # position of what the reader gives next

    @property
    def in_memory(self) -> bool:
        """Whether the batches can be saved with the adapter."""
        return isinstance(self.batches, (list, tuple))

    def __getitem__(self, position: int) -> Batch:
        if isinstance(self.batches, Sequence):
            if len(self.batches) == 0:
                raise _nothing_left()
            return self.batches[position % len(self.batches)]
        if self._reader is None or position < self._at:
            self._reader, self._at = self._passes(), 0
        while True:
            batch = next(self._reader)
            self._at += 1
            if self._at > position:
                return batch

    def _passes(self) -> Iterator[Batch]:
        while True:
            empty = True
            for batch in preserving_rng(self.batches):
                empty = False
                yield batch
            if empty:
                raise _nothing_left()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None, "_at": 0}


def _nothing_left() -> ValueError:
    return ValueError(
        "`source` must give batches in every pass, got an empty one: pass a list or a data loader "
        "of (images, labels), not an iterator that is read to its end."
    )
