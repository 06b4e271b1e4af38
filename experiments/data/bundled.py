"""The bundled slice: the first 200 CIFAR-10 test images of each class, 2,000 in all.

They lie in ``cifar10_test_2000/`` as one lossless PNG (a mosaic that any viewer shows) and one JSON
file. ``python -m experiments bundle NPZ`` makes both again from the test set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from corruptions.pictures import read_picture
from experiments.data.cifar import CIFAR10_CLASSES, read_npz
from experiments.data.image_set import ImageSet

__all__ = ["FOLDER", "Bundling", "add_flags", "read_bundled", "write_bundled"]

FOLDER = Path(__file__).parent / "cifar10_test_2000"
COLUMNS = 50  # images side by side in the mosaic
SIDE = 32


def read_bundled(folder: str | Path = FOLDER) -> ImageSet:
    """Read the bundled slice in CIFAR-10 test order; `index` is each image's position there."""
    folder = Path(folder)
    for name in ("images.png", "labels.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"`{folder / name}` is missing: it is part of the repository, so restore it with "
                f"`git checkout -- {folder}`"
            )
    table = json.loads((folder / "labels.json").read_text())
    labels, index = (np.array(table[key], dtype=np.int64) for key in ("labels", "index"))
    mosaic = np.asarray(read_picture(folder / "images.png"))
    images = _cut(mosaic)[: len(labels)]
    if hashlib.sha256(images.tobytes()).hexdigest() != table["sha256"]:
        raise ValueError(
            f"`{folder / 'images.png'}` does not decode to the pixels whose sha256 is in "
            f"labels.json: restore both with `git checkout -- {folder}`"
        )
    origin = f"first {len(labels) // 10} CIFAR-10 test images of each class (bundled)"
    return ImageSet(images, labels, tuple(table["classes"]), origin, index)


def write_bundled(test: ImageSet, folder: str | Path, per_class: int = 200) -> None:
    """Write the first `per_class` images of each class of the whole test set, in test order."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = test.balanced(per_class * len(test.classes))
    rows = -(-len(chosen) // COLUMNS)
    tiles = np.zeros((rows * COLUMNS, SIDE, SIDE, 3), dtype=np.uint8)
    tiles[: len(chosen)] = chosen.images
    mosaic = tiles.reshape(rows, COLUMNS, SIDE, SIDE, 3).swapaxes(1, 2)
    picture = Image.fromarray(mosaic.reshape(rows * SIDE, COLUMNS * SIDE, 3))
    picture.save(folder / "images.png", optimize=True)
    table = {
        "classes": list(CIFAR10_CLASSES),
        "sha256": hashlib.sha256(chosen.images.tobytes()).hexdigest(),
        "labels": chosen.labels.tolist(),
        "index": chosen.index.tolist(),
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    (folder / "labels.json").write_text("{" + lines + "}\n")


def _cut(mosaic: np.ndarray) -> np.ndarray:
    rows, columns = mosaic.shape[0] // SIDE, mosaic.shape[1] // SIDE
    tiles = mosaic.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2)
    return np.ascontiguousarray(tiles.reshape(rows * columns, SIDE, SIDE, 3))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``bundle`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("npz", type=Path, help="as `python -m experiments convert` writes it")
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    parser.set_defaults(prepare=lambda args: Bundling(read_npz(args.npz), args.output))


class Bundling:
    """Writes the slice.

    Args:
        images: The CIFAR-10 test set.
        folder: Where the files go.
    """

    def __init__(self, images: ImageSet, folder: Path) -> None:
        self.images = images
        self.folder = folder

    def execute(self) -> Path:
        """Write the files; returns their folder."""
        write_bundled(self.images, self.folder)
        size = sum(path.stat().st_size for path in self.folder.iterdir())
        count = len(read_bundled(self.folder))
        print(f"wrote {self.folder}: {count} images, {size / 1e6:.2f} MB")
        return self.folder
