"""CIFAR on disk: torchvision folders, ``.npz`` files and CIFAR-10-C / CIFAR-100-C folders.

CIFAR-10-C and CIFAR-100-C (Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261) are one
``<corruption>.npy`` of (50000, 32, 32, 3) uint8 per corruption: the 10,000 test images in test
order at severity 1, then the same at 2, up to 5. ``labels.npy`` repeats the labels five times.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from torchvision import datasets

from experiments.data.image_set import ImageSet, check_images

__all__ = ["CIFAR10_CLASSES", "list_cifar_c", "read_cifar", "read_cifar_c", "read_npz"]

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

_FOLDERS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def read_cifar(root: str | Path, name: str = "cifar10", split: str = "test") -> ImageSet:
    """Read CIFAR-10 or CIFAR-100 from the folder that torchvision downloads.

    Args:
        root: The folder holding ``cifar-10-batches-py`` (or ``cifar-100-python``), or that itself.
        name: "cifar10" or "cifar100".
        split: "train" (50,000 images) or "test" (10,000).
    """
    if name not in _FOLDERS:
        raise ValueError(f"`name` must be one of {', '.join(_FOLDERS)}, got {name!r}")
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}")
    kind, root = _FOLDERS[name], Path(root)
    if root.name == kind.base_folder:
        root = root.parent
    listed = kind.train_list if split == "train" else kind.test_list
    for file in [entry[0] for entry in listed] + [kind.meta["filename"]]:
        path = root / kind.base_folder / file
        if not path.is_file():
            raise FileNotFoundError(
                f"`{path}` is missing: unpack {kind.filename} into {root} (torchvision downloads "
                f"it with datasets.{kind.__name__}({str(root)!r}, download=True))"
            )
    try:
        data = kind(str(root), train=split == "train", download=False)
    except RuntimeError as error:  # torchvision compares checksums, and says no more than that
        raise ValueError(
            f"`{root / kind.base_folder}` does not have torchvision's checksums, so a file in it "
            f"is short or changed: unpack {kind.filename} again"
        ) from error
    labels = np.asarray(data.targets)
    return ImageSet(data.data, labels, tuple(data.classes), f"{kind.__name__} {split} in {root}")


def read_npz(path: str | Path, split: str = "test") -> ImageSet:
    """Read one split of CIFAR-10 from the ``.npz`` that `python -m experiments convert` writes."""
    path = Path(path)
    _require(path, "make it with `python -m experiments convert`")
    try:
        loaded = np.load(path)
    except (ValueError, EOFError, zipfile.BadZipFile):
        loaded = None
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError(
            f"`{path}` must be a whole .npz file, got something else: make it with "
            "`python -m experiments convert`"
        )
    with loaded as file:
        keys = f"{split}_images", f"{split}_labels"
        missing = [key for key in keys if key not in file.files]
        if missing:
            raise ValueError(
                f"`{path}` must hold {keys[0]} and {keys[1]}, got {', '.join(file.files)}: make "
                "it with `python -m experiments convert`"
            )
        images, labels = (file[key] for key in keys)
    return ImageSet(images, labels, CIFAR10_CLASSES, f"CIFAR10 {split} in {path}")


def list_cifar_c(folder: str | Path) -> list[str]:
    """The corruptions that a CIFAR-C folder has, alphabetically."""
    return sorted(path.stem for path in Path(folder).glob("*.npy") if path.stem != "labels")


def read_cifar_c(
    folder: str | Path,
    corruption: str,
    severity: int,
    per_severity: int = 10_000,
    classes: tuple[str, ...] | None = None,
) -> ImageSet:
    """Read one corruption at one severity from a CIFAR-10-C or CIFAR-100-C folder.

    Only the rows of that severity are read from disk.

    Args:
        folder: Holds ``<corruption>.npy`` and ``labels.npy``.
        corruption: Name as in the file name, for example "gaussian_noise".
        severity: 1 to 5.
        per_severity: Rows for each severity; 10,000 in the published files.
        classes: Class names; default CIFAR-10's if all labels are below 10, else numbers.
    """
    if severity not in range(1, 6):
        raise ValueError(f"`severity` must be an integer in 1..5, got {severity}")
    folder = Path(folder)
    path, labels_path = folder / f"{corruption}.npy", folder / "labels.npy"
    have = ", ".join(list_cifar_c(folder)) or "no .npy files"
    _require(path, f"unpack the CIFAR-C archive into {folder}, which has {have}")
    _require(labels_path, "it comes with the CIFAR-C archive: unpack that again")
    rows = 5 * per_severity
    images, labels = _load(path), _load(labels_path)
    check_images(images[:0], labels[:0], str(path))
    for file, array in ((path, images), (labels_path, labels)):
        if len(array) != rows:
            raise ValueError(
                f"`{file}` must have {rows} rows (5 severities of {per_severity}), got "
                f"{len(array)}: fetch it again"
            )
    part = slice((severity - 1) * per_severity, severity * per_severity)
    chosen = np.asarray(labels[part])
    if classes is None:
        count = int(labels.max()) + 1
        classes = CIFAR10_CLASSES if count <= 10 else tuple(str(i) for i in range(count))
    return ImageSet(
        np.array(images[part]), chosen, classes, f"{corruption} severity {severity} in {folder}"
    )


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:  # a cut-off file cannot be mapped, or has no header
        raise ValueError(
            f"`{path}` is not a whole .npy file ({path.stat().st_size} bytes): fetch it again"
        ) from error


def _require(path: Path, advice: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` is missing: {advice}")
