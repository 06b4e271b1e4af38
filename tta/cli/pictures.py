"""Pictures of a folder, in batches as a model takes them; shared by commands."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tta.core.checks import told

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tta.runtime.model_strings import Transform

__all__ = ["PictureLoader", "choose_pictures", "picture_files"]


def picture_files(folder: Path) -> dict[str, list[str]]:
    """Pictures by class folder; by "" where there are none."""
    from tta.runtime.frames import listed

    if not folder.is_dir():
        raise FileNotFoundError(
            f"`FOLDER` must be a folder of pictures, but {told(folder)} is none: check the path."
        )
    found: dict[str, list[str]] = {}
    for path, _ in listed(folder):
        inner = Path(path).relative_to(folder).parts
        found.setdefault(inner[0] if len(inner) > 1 else "", []).append(path)
    if not found:
        raise ValueError(
            f"`FOLDER` must hold pictures, but {told(folder)} has none: check the path."
        )
    if len(found) > 1:
        found.pop("", None)  # beside class folders, a preview or the like
    return found


def choose_pictures(
    files: dict[str, list[str]], labels: dict[str, int], most: int, seed: int
) -> list[tuple[str, int]]:
    """Pictures with their labels in a random order, as many of each class as there can be."""
    chance = random.Random(seed)
    lines = {folder: chance.sample(paths, len(paths)) for folder, paths in sorted(files.items())}
    found: list[tuple[str, int]] = []
    for place in range(max(map(len, lines.values()))):
        found += [(paths[place], labels[f]) for f, paths in lines.items() if place < len(paths)]
        if len(found) >= most:
            break
    found = found[:most]
    chance.shuffle(found)
    return found


def like_weights(model: nn.Module) -> Tensor:
    """A tensor of the dtype and on the device of the images that a model takes."""
    import torch

    weights = (p for p in model.parameters() if p.is_floating_point())
    return next(weights, torch.empty(())).detach()


class PictureLoader:
    """Batches of pictures with their labels, as often as asked; what cannot be read is left out.

    Args:
        files: Paths and labels.
        transform: A picture to a tensor.
        batch_size: Pictures in a batch.
        model: On whose device, and in whose dtype, they are given.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        transform: Transform,
        batch_size: int,
        model: nn.Module,
    ) -> None:
        self.files, self.transform = files, transform
        self.batch_size, self.like = batch_size, like_weights(model)
        self.unreadable: set[str] = set()
        self._drawn = 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        import torch

        images: list[Tensor] = []
        labels: list[int] = []
        for number, (path, label) in enumerate(self.files, 1):
            image = self._read(path)
            if image is not None:
                images.append(image)
                labels.append(label)
            if images and (len(images) == self.batch_size or number == len(self.files)):
                yield self._joined(images), torch.tensor(labels, device=self.like.device)
                images, labels = [], []
            self._progress(number)

    def _joined(self, images: list[Tensor]) -> Tensor:
        import torch

        sizes = {tuple(image.shape) for image in images}
        if len(sizes) > 1:
            few = " and ".join(str(size) for size in sorted(sizes)[:2])
            raise ValueError(
                f"`FOLDER` must hold pictures that the model's transform brings to one size, got "
                f"{few}: give the model a transform that resizes, or take --batch-size 1."
            )
        return torch.stack(images).to(self.like)

    def end(self) -> None:
        """Say what was left out."""
        if self.unreadable:
            first = told(min(self.unreadable), 100)
            print(
                f"warning: {len(self.unreadable)} pictures that cannot be read were left out, "
                f"such as {first}",
                file=sys.stderr,
            )

    def _read(self, path: str) -> Tensor | None:
        from tta.runtime.frames import read_picture

        if path in self.unreadable:
            return None
        try:
            return self.transform(read_picture(path))
        except (ValueError, OSError):
            self.unreadable.add(path)
            if len(self.unreadable) == len(self.files):
                raise
            return None

    def _progress(self, number: int) -> None:
        if sys.stderr.isatty() and time.monotonic() - self._drawn > 0.25:
            self._drawn = time.monotonic()
            print(f"\r\x1b[K{number:,} of {len(self.files):,}\r", end="", file=sys.stderr)
