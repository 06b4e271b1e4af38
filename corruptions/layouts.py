"""The two published layouts: what there is to write, and how one piece of it is written.

CIFAR-10-C is one ``<corruption>.npy`` for each corruption, (5 N, 32, 32, 3) uint8: the N test
images at severity 1, then at 2, up to 5; ``labels.npy`` repeats the labels as often. ImageNet-C is
``<corruption>/<severity>/<class>/<image>.JPEG``, JPEGs of quality 85.

Source: Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from corruptions import check
from corruptions.api import corrupt
from corruptions.draws import image_seeds
from corruptions.manifest import put, put_bytes
from corruptions.pictures import OnError, UnreadablePictureError, find_pictures, read_picture
from corruptions.severity import ParameterSet

__all__ = ["Cifar", "Folder", "Layout", "Options", "load_picture", "read_cifar10"]

_BATCH = 500
# Number of pictures in one piece of work, which are all held in memory.
_PICTURES = 16


@dataclass(frozen=True)
class Options:
    """What decides the content of the files, besides the images.

    Attributes:
        names: Corruptions.
        severities: Severities, in the order of the rows of CIFAR-10-C.
        seed: Seed of all draws.
        parameters: See `corrupt`.
        frost_pictures: See `corrupt`.
        limit: Use this many images, None for all.
    """

    names: tuple[str, ...]
    severities: tuple[int, ...]
    seed: int = 0
    parameters: ParameterSet = "auto"
    frost_pictures: str | None = None
    limit: int | None = None


class Layout(Protocol):
    """A data set to write, in pieces that separate processes can do."""

    @property
    def options(self) -> Options:
        """What to make of the images."""
        ...

    @property
    def count(self) -> int:
        """How many images are used."""
        ...

    def settings(self) -> dict[str, Any]:
        """What must not change between the start and a resumption."""
        ...

    def pieces(self) -> list[Any]:
        """Pieces of work, each for `write`."""
        ...

    def files(self, piece: Any) -> list[str]:
        """Names of the files that a piece makes."""
        ...

    def write(
        self, output: Path, piece: Any, missing: set[str]
    ) -> Iterator[int | UnreadablePictureError]:
        """Write the missing files of a piece; yields counts of newly corrupted images.

        Where pictures that cannot be read are left out, it yields the error of each.
        """
        ...

    def example(self, output: Path, name: str | None, severity: float) -> np.ndarray:
        """One picture of the contact sheet, read from the files; clean without a name."""
        ...


def _corrupted(
    images: Tensor, options: Options, name: str, severity: int, keys: list[str]
) -> np.ndarray:
    """Corrupt images (B, 3, H, W) of a data set, to (B, H, W, 3) uint8."""
    out = corrupt(
        images,
        name,
        severity,
        seeds=image_seeds(options.seed, name, severity, keys),
        parameters=options.parameters,
        frost_pictures=options.frost_pictures,
    )
    return np.ascontiguousarray(out.movedim(1, -1).numpy())


@lru_cache(maxsize=1)
def read_cifar10(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10 test images.

    Args:
        path: torchvision's folder (it holds ``cifar-10-batches-py``), or an ``.npz`` with
            ``test_images`` (N, 32, 32, 3) uint8 and ``test_labels`` (N,).

    Returns:
        Images and labels.
    """
    if path.is_file():
        with np.load(path) as file:
            if not {"test_images", "test_labels"} <= set(file.files):
                raise ValueError(
                    f"`data` must be an .npz with test_images and test_labels, got {path} with "
                    f"{', '.join(file.files)}: rename the arrays"
                )
            images, labels = file["test_images"], file["test_labels"]
    else:
        root = path.parent if path.name == datasets.CIFAR10.base_folder else path
        if not (root / datasets.CIFAR10.base_folder).is_dir():
            raise ValueError(
                f"`data` must be a folder with {datasets.CIFAR10.base_folder} or an .npz, got "
                f"{path}: unpack the CIFAR-10 archive there"
            )
        data = datasets.CIFAR10(str(root), train=False)
        images, labels = data.data, np.asarray(data.targets)
    if images.dtype != np.uint8 or images.shape != (len(labels), 32, 32, 3) or not len(labels):
        raise ValueError(
            "`data` must hold images of shape (N, 32, 32, 3) uint8 and as many labels, got "
            f"{images.shape} {images.dtype} and {len(labels)} labels: check {path}"
        )
    return images, labels


@dataclass(frozen=True)
class Cifar:
    """The layout of CIFAR-10-C; a piece is one ``.npy`` file.

    Attributes:
        data: See `read_cifar10`.
        options: What to make of it.
    """

    data: Path
    options: Options

    def images(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels that are used."""
        images, labels = read_cifar10(self.data)
        return images[: self.options.limit], labels[: self.options.limit]

    @property
    def count(self) -> int:
        """How many images are used."""
        return len(self.images()[0])

    def settings(self) -> dict[str, Any]:
        """What must not change between the start and a resumption."""
        images, labels = self.images()
        content = hashlib.sha256(images.tobytes())
        content.update(labels.astype(np.int64).tobytes())
        return {"layout": "cifar10", "images": len(images), "sha256": content.hexdigest()}

    def pieces(self) -> list[str]:
        """The labels, and the corruptions."""
        return ["labels", *self.options.names]

    def files(self, piece: str) -> list[str]:
        """The one file of a piece."""
        return [f"{piece}.npy"]

    def write(self, output: Path, piece: str, missing: set[str]) -> Iterator[int]:
        """Write the file of a piece; yields counts of newly corrupted images."""
        images, labels = self.images()
        severities = self.options.severities
        if piece == "labels":
            content = io.BytesIO()
            np.save(content, np.tile(labels.astype(np.int64), len(severities)))
            put_bytes(output, "labels.npy", content.getvalue())
            return
        rows = np.empty((len(severities) * len(images), 32, 32, 3), dtype=np.uint8)
        for place, severity in enumerate(severities):
            for first in range(0, len(images), _BATCH):
                batch = torch.from_numpy(images[first : first + _BATCH]).movedim(-1, 1)
                keys = [str(i) for i in range(first, first + len(batch))]
                out = _corrupted(batch.contiguous(), self.options, piece, severity, keys)
                start = place * len(images) + first
                rows[start : start + len(out)] = out
                yield len(out)

        def save(part: Path) -> None:
            with part.open("wb") as file:
                np.save(file, rows)

        put(output, f"{piece}.npy", save)

    def example(self, output: Path, name: str | None, severity: float) -> np.ndarray:
        """The first image."""
        images, _ = self.images()
        if name is None:
            return images[0]
        place = [float(s) for s in self.options.severities].index(severity)
        return np.load(output / f"{name}.npy", mmap_mode="r")[place * len(images)]


def load_picture(path: Path, resize: int | None, crop: int | None) -> np.ndarray:
    """Decode a picture to (H, W, 3) uint8, upright; errors are those of `read_picture`.

    Args:
        path: Any format that Pillow reads.
        resize: New length of the shorter side, bilinear and antialiased; None keeps the size.
        crop: Side of the square that is then cut out of the middle; None keeps all.
    """
    picture = read_picture(path)
    if resize is not None:
        short = min(picture.size)
        # The longer side is truncated to an integer, as torchvision does.
        width, height = (
            resize if side == short else int(resize * side / short) for side in picture.size
        )
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    if crop is not None:
        left, top = (round((side - crop) / 2.0) for side in picture.size)
        picture = picture.crop((left, top, left + crop, top + crop))
    return np.asarray(picture)


@dataclass(frozen=True)
class Folder:
    """The layout of ImageNet-C; a piece is a few pictures in all their corruptions.

    Attributes:
        data: Folder with pictures in folders, one for each class.
        options: What to make of it.
        resize: See `load_picture`.
        crop: See `load_picture`.
        on_error: Whether a picture that cannot be read stops the writing or is left out.
        paths: Paths of the pictures inside `data`, with forward slashes.
    """

    data: Path
    options: Options
    resize: int | None = None
    crop: int | None = None
    on_error: OnError = "raise"
    paths: tuple[str, ...] = ()

    @staticmethod
    def open(
        data: Path,
        options: Options,
        resize: int | None = None,
        crop: int | None = None,
        on_error: OnError = "raise",
    ) -> Folder:
        """Find the pictures."""
        check.on_error(on_error)
        if not data.is_dir():
            raise ValueError(f"`data` must be a folder of pictures, got {data}: check the path")
        found = find_pictures(data)
        if not found:
            raise ValueError(
                f"`data` must hold pictures ({', '.join(datasets.folder.IMG_EXTENSIONS)}), got "
                f"{data} without any: check the path"
            )
        paths = tuple(found[: options.limit])
        return Folder(data, options, resize, crop, on_error, paths)

    @property
    def count(self) -> int:
        """How many pictures were found and are used."""
        return len(self.paths)

    def settings(self) -> dict[str, Any]:
        """What must not change between the start and a resumption."""
        listing = hashlib.sha256("\n".join(self.paths).encode()).hexdigest()
        size = {"resize": self.resize, "crop": self.crop}
        return {"layout": "folder", "images": len(self.paths), "paths": listing, **size}

    def pieces(self) -> list[tuple[str, ...]]:
        """Neighbouring pictures."""
        starts = range(0, len(self.paths), _PICTURES)
        return [self.paths[start : start + _PICTURES] for start in starts]

    def files(self, piece: tuple[str, ...]) -> list[str]:
        """All corruptions and severities of the pictures."""
        return [
            self._file(name, severity, path)
            for name in self.options.names
            for severity in self.options.severities
            for path in piece
        ]

    @staticmethod
    def _file(name: str, severity: int, path: str) -> str:
        stem, dot, suffix = path.rpartition(".")
        # Other formats keep their suffix, so that x.png and x.jpg do not become one file.
        plain = f"{stem}{dot}" if suffix.lower() in ("jpg", "jpeg") else f"{path}."
        return f"{name}/{severity}/{plain}JPEG"

    def write(
        self, output: Path, piece: tuple[str, ...], missing: set[str]
    ) -> Iterator[int | UnreadablePictureError]:
        """Write the missing files of a piece; yields counts of newly corrupted images.

        A picture that is left out is yielded as the error that reading it raised.
        """
        needed = {path for path in piece if missing.intersection(self.files((path,)))}
        pictures = {}
        for path in sorted(needed):
            try:
                pictures[path] = self._load(path)
            except UnreadablePictureError as error:
                if self.on_error == "raise":
                    raise
                yield error
        for name in self.options.names:
            for severity in self.options.severities:
                by_size: dict[tuple[int, ...], list[str]] = {}
                for path, pixels in pictures.items():
                    if self._file(name, severity, path) in missing:
                        by_size.setdefault(pixels.shape, []).append(path)
                for paths in by_size.values():
                    batch = torch.from_numpy(np.stack([pictures[path] for path in paths]))
                    batch = batch.movedim(-1, 1).contiguous()
                    out = _corrupted(batch, self.options, name, severity, paths)
                    for path, pixels in zip(paths, out, strict=True):
                        content = io.BytesIO()
                        image = Image.fromarray(pixels)
                        image.save(content, "jpeg", quality=85, optimize=True)
                        put_bytes(output, self._file(name, severity, path), content.getvalue())
                    yield len(paths)

    def example(self, output: Path, name: str | None, severity: float) -> np.ndarray:
        """The first picture of those that can be read."""
        path = self._first
        if name is None:
            return self._load(path)
        return np.asarray(read_picture(output / self._file(name, int(severity), path)))

    def _load(self, path: str) -> np.ndarray:
        return load_picture(self.data / path, self.resize, self.crop)

    @cached_property
    def _first(self) -> str:
        if self.on_error == "raise":
            return self.paths[0]
        for path in self.paths:
            try:
                self._load(path)
            except UnreadablePictureError:
                continue
            return path
        raise ValueError(
            f"`data` must hold pictures that can be read, but none of the {len(self.paths)} in "
            f"{self.data} can: check the files"
        )
