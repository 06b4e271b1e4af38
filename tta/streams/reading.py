"""Images read ahead by processes of their own, where a dataset decodes files.

Only reading happens there: transforms and their draws stay with the stream, so that images are the
same bit for bit, and transforms may be on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tta.streams.pool import Ints
from tta.streams.sources import ImageSource

__all__ = ["Part", "Read", "read_ahead"]

AHEAD = 2  # batches for each process
# What one condition of a batch shows: the dataset's number, and positions in it.
Part = tuple[int, Ints]
Read = Tensor | list[Tensor]


class _Reader(Dataset[list[Any]]):
    """What runs in a process: parts of a batch in, their images out.

    Args:
        sources: Datasets by number.
        each: Leave images apart, which may differ in size.
    """

    def __init__(self, sources: list[ImageSource], each: bool) -> None:
        self.sources, self.each = sources, each

    def __getitem__(self, parts: Any) -> list[Any]:
        """Read a batch; images apart go as arrays, since each tensor would take a file handle."""
        read = [_read(self.sources[number], index, self.each) for number, index in parts]
        return [part if isinstance(part, Tensor) else [i.numpy() for i in part] for part in read]


def read_ahead(
    batches: Iterable[list[Part]], sources: list[ImageSource], each: bool, workers: int
) -> Iterator[list[Read]]:
    """Read batches in order, those to come in `workers` processes meanwhile.

    Args:
        batches: The parts of each batch.
        sources: Datasets by number.
        each: As `ImageSource.each` and not as `ImageSource.images`.
        workers: At least 1.

    Yields:
        The images of each part: (B, 3, H, W), or (3, H, W) each.
    """
    asked: deque[list[Part]] = deque()

    def ask() -> Iterator[list[Part]]:
        for parts in batches:
            asked.append(parts)
            yield parts

    loader = DataLoader(
        _Reader(sources, each),
        batch_size=None,
        sampler=ask(),
        num_workers=workers,
        prefetch_factor=AHEAD,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # or else it draws from torch's own
    )
    ready = iter(loader)
    while True:
        try:
            batch = next(ready, None)
        except Exception:
            # Read here, what cannot be read is said as it is, and not as a process's last words.
            for number, index in asked[0]:
                _read(sources[number], index, each)
            raise
        if batch is None:
            return
        asked.popleft()
        yield [
            part if isinstance(part, Tensor) else [torch.from_numpy(i) for i in part]
            for part in batch
        ]


def _read(source: ImageSource, index: Ints, each: bool) -> Read:
    return source.each(np.asarray(index)) if each else source.images(np.asarray(index))


def _as_it_is(value: Any) -> Any:
    return value
