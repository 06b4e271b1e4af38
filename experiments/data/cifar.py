"""CIFAR on disk: torchvision folders, ``.npz`` files and CIFAR-10-C / CIFAR-100-C folders.

CIFAR-10-C and CIFAR-100-C (Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261) are one
``<corruption>.npy`` of (50000, 32, 32, 3) uint8 per corruption: the 10,000 test images in test
order at severity 1, then the same at 2, up to 5. ``labels.npy`` repeats the labels five times.

Folders of other numbers of images or severities have the same layout. Which blocks their files hold
is read from ``settings.json``, which ``python -m corruptions write`` puts there. Without it, a file
has five severities where its labels repeat five times or where there is one label for five rows;
another file is one block, which is read for every severity.

CIFAR-10.1 (Recht et al., 2018, arXiv 1806.00451) is ``<name>_data.npy`` with
``<name>_labels.npy``: one block, called ``<name>``.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from corruptions.manifest import SETTINGS
from experiments.data.image_set import ImageSet, check_images
from tta.core.checks import shown

__all__ = [
    "CIFAR10_CLASSES",
    "list_cifar_c",
    "read_cifar",
    "read_cifar_c",
    "read_npz",
    "written_severities",
]

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

SEVERITIES = (1, 2, 3, 4, 5)
_DATA, _LABELS = "_data.npy", "_labels.npy"  # how the files of CIFAR-10.1 end
_FOLDERS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def read_cifar(root: str | Path, name: str = "cifar10", split: str = "test") -> ImageSet:
    """Read CIFAR-10 or CIFAR-100 from the folder that torchvision downloads.

    Args:
        root: The folder holding ``cifar-10-batches-py`` (or ``cifar-100-python``), or that itself.
        name: "cifar10" or "cifar100".
        split: "train" (50,000 images) or "test" (10,000).
    """
    if name not in _FOLDERS:
        raise ValueError(f"`name` must be one of {', '.join(_FOLDERS)}, got {shown(name)}")
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {shown(split)}")
    kind, root = _FOLDERS[name], Path(root)
    if root.name == kind.base_folder:
        root = root.parent
    listed = kind.train_list if split == "train" else kind.test_list
    for file in [entry[0] for entry in listed] + [kind.meta["filename"]]:
        path = root / kind.base_folder / file
        if not path.is_file():
            raise FileNotFoundError(
                f"`{path}` is missing: unpack {kind.filename} into {root} (torchvision downloads "
                f"it with datasets.{kind.__name__}({shown(str(root))}, download=True))"
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
    """The corruptions that a CIFAR-C folder has, or the sets of one of CIFAR-10.1, sorted."""
    files = {path.name for path in Path(folder).glob("*.npy") if not path.name.startswith(".")}
    names = [name.removesuffix(_DATA) for name in files if _is_set(name, files)]
    plain = files - {f"{name}{end}" for name in names for end in (_DATA, _LABELS)} - {"labels.npy"}
    return sorted([*names, *(Path(name).stem for name in plain)])


def _is_set(name: str, files: set[str]) -> bool:
    return name.endswith(_DATA) and name.removesuffix(_DATA) + _LABELS in files


def read_cifar_c(
    folder: str | Path,
    corruption: str,
    severity: int,
    per_severity: int | None = None,
    classes: tuple[str, ...] | None = None,
) -> ImageSet:
    """Read one corruption at one severity from a folder with the layout of CIFAR-10-C.

    Only the rows of that severity are read from disk.

    Args:
        folder: Holds ``<corruption>.npy`` and ``labels.npy``, or ``<corruption>_data.npy`` and
            ``<corruption>_labels.npy``.
        corruption: Name as in the file name, for example "gaussian_noise".
        severity: 1 to 5.
        per_severity: Rows for each of five severities; default: as the module says.
        classes: Class names; default CIFAR-10's if all labels are below 10, else numbers.

    Raises:
        FileNotFoundError: Where a file is missing.
        ValueError: Where a file is not whole, does not have the rows it should have, or lacks the
            severity.
    """
    if severity not in SEVERITIES:
        raise ValueError(f"`severity` must be an integer in 1..5, got {severity}")
    folder = Path(folder)
    path, labels_path = folder / f"{corruption}.npy", folder / "labels.npy"
    one_block = not path.is_file() and (folder / f"{corruption}{_DATA}").is_file()
    if one_block:
        path, labels_path = folder / f"{corruption}{_DATA}", folder / f"{corruption}{_LABELS}"
    have = ", ".join(list_cifar_c(folder)) or "no .npy files"
    _require(path, f"unpack the CIFAR-C archive into {folder}, which has {have}")
    _require(labels_path, "it comes with the CIFAR-C archive: unpack that again")
    images, labels = _load(path), _load(labels_path)
    check_images(images[:0], labels[:0], str(path))
    if per_severity is not None:
        blocks = _Blocks(SEVERITIES, per_severity, f"5 severities of {per_severity}")
    elif one_block:
        blocks = _Blocks((), len(images), "one for each image")
    else:
        blocks = _written_blocks(folder) or _blocks_of(images, labels)
    for file, array, rows in (
        (path, images, blocks.rows),
        (labels_path, labels, blocks.label_rows or blocks.rows),
    ):
        if len(array) != rows:
            raise ValueError(
                f"`{file}` must have {rows} rows ({blocks.words}), got {len(array)}: write or "
                "fetch the folder again"
            )
    part = blocks.part(severity, path)
    chosen = np.asarray(labels[: blocks.count] if blocks.label_rows else labels[part])
    if classes is None:
        count = int(labels.max()) + 1
        classes = CIFAR10_CLASSES if count <= 10 else tuple(str(i) for i in range(count))
    level = f" severity {severity}" if blocks.severities else ""
    return ImageSet(np.array(images[part]), chosen, classes, f"{corruption}{level} in {folder}")


@dataclass(frozen=True)
class _Blocks:
    """How the rows of a file are divided.

    Args:
        severities: In the order of the rows; empty for one block of an unknown severity.
        count: Images of each severity.
        words: The division in words.
        label_rows: Rows of the labels where they begin with those of one block; None where there
            are labels for all blocks.
    """

    severities: tuple[int, ...]
    count: int
    words: str
    label_rows: int | None = None

    @property
    def rows(self) -> int:
        return self.count * max(1, len(self.severities))

    def part(self, severity: int, path: Path) -> slice:
        """The rows of one severity."""
        if not self.severities:
            return slice(0, self.count)
        if severity not in self.severities:
            have = ", ".join(map(str, self.severities))
            raise ValueError(
                f"`severity` must be one of those that {path} has ({have}), got {severity}: ask "
                "for one of these, or write that severity"
            )
        start = self.severities.index(severity) * self.count
        return slice(start, start + self.count)


def _blocks_of(images: np.ndarray, labels: np.ndarray) -> _Blocks:
    """The blocks of files that nothing describes, as the module says."""
    count, rest = divmod(len(labels), len(SEVERITIES))
    five = f"5 severities of {count}, as the labels say"
    repeat = bool(count) and not rest
    repeat = repeat and bool((np.reshape(labels, (5, -1)) == labels[:count]).all())
    if repeat and len(images) == count:
        return _Blocks((), count, "one for each image", len(labels))
    if repeat:
        return _Blocks(SEVERITIES, count, five)
    if len(images) == 5 * len(labels):
        words = f"5 severities of {len(labels)}"
        return _Blocks(SEVERITIES, len(labels), words, len(labels))
    return _Blocks((), len(labels), "one for each label")


def _settings(folder: Path) -> dict[str, Any]:
    """What the writer of the corruptions says it wrote; empty for other folders."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _written_blocks(folder: Path) -> _Blocks | None:
    settings = _settings(folder)
    count, severities = settings.get("images"), written_severities(folder)
    if settings.get("layout") != "cifar10" or not severities or not isinstance(count, int):
        return None
    words = f"severity {severities[0]}" if len(severities) == 1 else f"{len(severities)} severities"
    return _Blocks(severities, count, f"{words} of {count}, as {SETTINGS} says")


def written_severities(folder: str | Path) -> tuple[int, ...]:
    """The severities that the writer of the corruptions says it wrote; empty for other folders."""
    found = _settings(Path(folder)).get("severities")
    if not isinstance(found, list) or not all(level in SEVERITIES for level in found):
        return ()
    return tuple(int(level) for level in found)


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
