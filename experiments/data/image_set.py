"""Labelled images in memory, in the one layout that all array loaders return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["ImageSet", "LabelledSet", "balanced_positions", "check_images"]


class LabelledSet(Protocol):
    """What `ImageSet` and `FolderSet` have in common."""

    @property
    def origin(self) -> str: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def index(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitem__(self, position: int) -> tuple[Tensor, int]: ...
    def subset(self, positions: Sequence[int] | np.ndarray) -> LabelledSet: ...
    def balanced(self, count: int) -> LabelledSet: ...


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one size, as `tta.streams.build` takes them.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N,) int64, each in 0..len(classes) - 1.
        classes: Class names in label order.
        origin: What the images are, in words, for results files.
        index: (N,) position of each image in the set it was taken from; default 0..N - 1.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    origin: str
    index: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        check_images(self.images, self.labels, self.origin)
        labels = np.asarray(self.labels, dtype=np.int64)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise ValueError(
                f"`{self.origin}` has labels {labels.min()}..{labels.max()}, expected "
                f"0..{len(self.classes) - 1}: check that images and labels belong together"
            )
        object.__setattr__(self, "labels", labels)
        if not len(self.index):
            object.__setattr__(self, "index", np.arange(len(labels)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        """The image as (3, H, W) uint8, and its label."""
        image = torch.from_numpy(np.ascontiguousarray(self.images[position].transpose(2, 0, 1)))
        return image, int(self.labels[position])

    def tensor(self) -> Tensor:
        """All images as (N, 3, H, W) uint8."""
        return torch.from_numpy(np.ascontiguousarray(self.images.transpose(0, 3, 1, 2)))

    def subset(self, positions: Sequence[int] | np.ndarray) -> ImageSet:
        """The images at `positions`, in that order."""
        positions = np.asarray(positions, dtype=np.int64)
        return replace(
            self,
            images=self.images[positions],
            labels=self.labels[positions],
            index=self.index[positions],
        )

    def balanced(self, count: int) -> ImageSet:
        """As many images of every class there is, `count` in all, in the order of this set."""
        return self.subset(balanced_positions(self, count))


def check_images(images: np.ndarray, labels: np.ndarray, name: str) -> None:
    """Raise if the arrays are not (N, H, W, 3) uint8 with N labels; `name` says whose they are."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"`{name}` must hold images as (N, height, width, 3) uint8, got {images.shape} "
            f"{images.dtype}: convert it or fetch it again"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"`{name}` has {len(images)} images but labels of shape {labels.shape}: images and "
            "labels do not belong together"
        )


def balanced_positions(data: LabelledSet, count: int) -> np.ndarray:
    """Positions, ascending, of the first ``count / classes`` images of every class there is."""
    there = np.unique(data.labels).tolist()
    per_class, rest = divmod(count, len(there))
    if count < 1 or rest:
        raise ValueError(
            f"`images` must be a positive multiple of the {len(there)} classes, "
            f"got {count}: a balanced set needs the same number of each"
        )
    keep = np.zeros(len(data.labels), dtype=bool)
    for label in there:
        found = np.flatnonzero(data.labels == label)[:per_class]
        if len(found) < per_class:
            raise ValueError(
                f"`images` = {count} needs {per_class} images of class {data.classes[label]}, but "
                f"`{data.origin}` has {len(found)}: ask for fewer, or for `all`"
            )
        keep[found] = True
    return np.flatnonzero(keep)
