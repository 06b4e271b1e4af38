"""The samples that one visit, to a domain or to several pooled domains, can show."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ints", "Pool", "by_class"]

Ints = NDArray[np.int64]


class Pool:
    """Rows that a selection or an arrangement chooses from and orders.

    Both return row numbers; the pool says which dataset index, condition and label a row has.

    Args:
        index: (n,) positions in the dataset.
        which: (n,) number of the condition each row is shown under.
        read_labels: Gives the (n,) labels. It is called only by building blocks that need labels,
            since reading them can mean reading a whole dataset.
    """

    def __init__(self, index: Ints, which: Ints, read_labels: Callable[[], Ints]) -> None:
        self.index = index
        self.which = which
        self._read_labels = read_labels

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.index)

    @cached_property
    def labels(self) -> Ints:
        """Labels of the rows, (n,)."""
        return self._read_labels()

    def take(self, rows: Ints) -> Pool:
        """Return the pool of some rows, in that order."""
        return Pool(self.index[rows], self.which[rows], lambda: self.labels[rows])


def by_class(labels: Ints) -> list[Ints]:
    """List the rows of each class that occurs, in ascending class number.

    >>> [rows.tolist() for rows in by_class(np.array([3, 0, 3]))]
    [[1], [0, 2]]
    """
    order = np.argsort(labels, kind="stable")
    borders = np.flatnonzero(np.diff(labels[order])) + 1
    return np.split(order, borders)
