"""The bundled slice: the first 200 CIFAR-10 test images of each class, 2,000 in all.

They lie in ``cifar10_test_2000/`` as one lossless PNG (a mosaic that any viewer shows) and one JSON
file. ``python -m experiments.data.bundled NPZ`` makes both again from the test set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.data.cifar import CIFAR10_CLASSES, read_npz
from experiments.data.image_set import ImageSet

__all__ = ["FOLDER", "main", "read_bundled", "write_bundled"]

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
    with Image.open(folder / "images.png") as picture:
        mosaic = np.asarray(picture.convert("RGB"))
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


def main(argv: Sequence[str] | None = None) -> int:
    """Make the slice from a CIFAR-10 ``.npz``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.data.bundled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("npz", type=Path, help="as `python -m experiments.data.convert` writes it")
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    args = parser.parse_args(argv)
    try:
        write_bundled(read_npz(args.npz), args.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"wrote {args.output}: {len(read_bundled(args.output))} images, {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
