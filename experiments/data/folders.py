"""Images in folders, one folder per class: ImageNet-C and anything shaped like it.

Images are decoded when they are asked for; nothing is kept in memory. They are read by
`corruptions.pictures`, so any colour mode becomes RGB, pictures are upright as their EXIF
orientation says, and hidden files, such as the ``._name.jpg`` of macOS, are no pictures.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor
from torchvision.transforms import v2

from corruptions.pictures import (
    OnError,
    UnreadablePictureError,
    find_pictures,
    is_picture,
    read_picture,
)
from experiments.data.image_set import balanced_positions
from experiments.data.labels import read_labels
from tta.core.checks import one_of

__all__ = [
    "FolderSet",
    "are_classes",
    "has_pictures",
    "label_order",
    "list_domains",
    "list_folders",
    "list_imagenet_c",
    "list_severities",
    "read_folder",
    "read_imagenet_c",
    "refuse_splits",
]

SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
_TOLD = 5  # pictures left out that are named


class FolderSet:
    """Labelled image files, decoded on access.

    Args:
        files: (path, label) of each image.
        classes: Class names in label order.
        origin: What the images are, in words, for results files.
        size: Height and width every image is brought to: the shorter side is resized to
            `size / crop`, then the middle is cut out. Images of that size already are not touched.
        crop: Share of the resized image that is kept; 0.875 is usual for ImageNet.
        on_error: What to do about pictures that cannot be read: "raise" when one is asked for, or
            "skip" to leave them out. For "skip" every picture is decoded once here, a warning
            names those that are left out, and `skipped` and `origin` say so.

    Attributes:
        skipped: Why each picture was left out, one sentence each.

    Raises:
        ValueError: Where no picture is left.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        classes: Sequence[str],
        origin: str,
        size: int = 224,
        crop: float = 0.875,
        on_error: OnError = "raise",
    ) -> None:
        one_of("on_error", on_error, ("raise", "skip"))
        self.files = list(files)
        self.classes = tuple(classes)
        self.origin = origin
        self.skipped: tuple[str, ...] = ()
        if on_error == "skip":
            self._leave_out()
        self.labels = np.array([label for _, label in self.files], dtype=np.int64)
        self.index = np.arange(len(self.files))
        self.size = size
        self._resize = v2.Compose(
            [v2.Resize(round(size / crop), antialias=True), v2.CenterCrop(size)]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        """The image as (3, size, size) uint8, and its label."""
        path, label = self.files[position]
        picture = read_picture(path)
        if picture.size != (self.size, self.size):
            picture = self._resize(picture)
        return v2.functional.pil_to_tensor(picture), label

    def _leave_out(self) -> None:
        """Leave out the pictures that cannot be read, and say so."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(_why_unreadable, [path for path, _ in self.files]))
        self.skipped = tuple(sorted(reason for reason in found if reason is not None))
        if not self.skipped:
            return
        count = f"{len(self.skipped)} of {len(self.files)} pictures"
        if len(self.skipped) == len(self.files):
            raise ValueError(
                f"`{self.origin}` must hold pictures that can be read, but none of the "
                f"{len(self.files)} can ({self.skipped[0]}): check the files"
            )
        more = len(self.skipped) - _TOLD
        warnings.warn(
            f"left out {count} of {self.origin}, which cannot be read: "
            f"{'; '.join(self.skipped[:_TOLD])}{f'; and {more} more' if more > 0 else ''}",
            stacklevel=4,
        )
        pairs = zip(self.files, found, strict=True)
        self.files = [file for file, reason in pairs if reason is None]
        self.origin += f" ({count} left out, which cannot be read)"

    def subset(self, positions: Sequence[int] | np.ndarray) -> FolderSet:
        """The images at `positions`, in that order."""
        part = object.__new__(FolderSet)
        part.__dict__.update(self.__dict__)
        part.files = [self.files[i] for i in positions]
        part.labels = self.labels[positions]
        part.index = self.index[positions]
        return part

    def balanced(self, count: int) -> FolderSet:
        """As many images of every class there is, `count` in all, in the order of this set."""
        return self.subset(balanced_positions(self, count))


def label_order(folders: Collection[str], num_classes: int | None = None) -> list[str]:
    """The names of class folders in the order of labels.

    Folders named by WordNet ids have the labels of the ImageNet models with so many classes, and
    folders named by numbers, as those of ImageNetV2, have these for labels: such sets may hold some
    of the classes only, as ImageNet-R does. Other names are sorted.

    Args:
        folders: Their names.
        num_classes: Of the model that is shown them; default: as many as there are folders.

    Raises:
        ValueError: Where the folders do not say which of the model's classes they are.
    """
    ids = _wordnet_ids(num_classes)
    if set(folders) <= set(ids):
        return [*ids]
    numbered = all(name.isdecimal() for name in folders)
    if num_classes is None or len(folders) == num_classes:
        return sorted(folders, key=int if numbered else None)
    found = {int(name): name for name in folders} if numbered else {}
    if numbered and max(found) < num_classes:
        return [found.get(label, str(label)) for label in range(num_classes)]
    few = ", ".join(sorted(folders)[:3])
    raise ValueError(
        f"`data` must have the {num_classes} classes of the model, got {len(folders)} folders "
        f"({few}{', ...' if len(folders) > 3 else ''}): which labels they have can be told by "
        "names that are numbers or WordNet ids, or by a file given as `classes`"
    )


def read_folder(
    root: str | Path,
    size: int = 224,
    classes: Sequence[str] | None = None,
    crop: float = 0.875,
    num_classes: int | None = None,
    *,
    labels: str | Path | None = None,
    on_error: OnError = "raise",
) -> FolderSet:
    """Read ``root/<class>/<image>``, or ``root/<image>`` with a list of labels.

    Args:
        root: The folder; its sub-folders are the classes.
        size: Height and width of the images given out.
        classes: Folder names in label order, for sets that have only some of a model's classes
            (ImageNet-R has 200 of 1,000). Default: see `label_order`.
        crop: See `FolderSet`.
        num_classes: Of the model, see `label_order`.
        labels: A text file with the label of each picture of a folder without class folders, such
            as ImageNet's validation images, see `experiments.data.labels`.
        on_error: See `FolderSet`.

    Raises:
        FileNotFoundError: Where the folder or its pictures are missing.
        ValueError: For folders that are no classes, or labels that do not fit the pictures.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"`{root}` is missing: expected a folder with one folder per class")
    if labels is not None:
        names = find_pictures(root)
        if not names:
            raise FileNotFoundError(
                f"`{root}` must hold pictures, one for each label of {labels}, but it has none"
            )
        order = _class_names(classes, num_classes)
        found = read_labels(labels, names, order, num_classes)
        order = order or [str(label) for label in range(num_classes or max(found) + 1)]
        pairs = zip(names, found, strict=True)
        files = [(str(root / name), label) for name, label in pairs]
        return FolderSet(files, order, str(root), size, crop, on_error)
    folders = sorted(list_folders(root))
    refuse_splits(root, folders, classes)
    if not folders:
        raise FileNotFoundError(
            f"`{root}` must hold one folder of images per class, but it has no folders"
        )
    pictures = {name: find_pictures(root / name) for name in folders}
    empty = [name for name, found in pictures.items() if not found]
    if empty:
        raise FileNotFoundError(
            f"`{root}` must hold one folder of images per class, but there are none in "
            f"{', '.join(empty[:3])}: remove empty folders"
        )
    if classes is None:
        classes = label_order(folders, num_classes)
    unknown = sorted(set(folders) - set(classes))
    if unknown:
        raise ValueError(
            f"`{root}` has folders that are not among the {len(classes)} classes "
            f"({', '.join(unknown[:3])}): remove them or pass the right `classes`"
        )
    label_of = {name: label for label, name in enumerate(classes)}
    files = [
        (str(root / name / path), label_of[name]) for name in folders for path in pictures[name]
    ]
    return FolderSet(files, classes, str(root), size, crop, on_error)


def _class_names(classes: Sequence[str] | None, num_classes: int | None) -> list[str] | None:
    """Class names in label order, where they are given or known by ImageNet's number of classes."""
    if classes is not None:
        return list(classes)
    return list(_wordnet_ids(num_classes)) or None


def refuse_splits(
    root: str | Path, folders: Collection[str], classes: Sequence[str] | None = None
) -> None:
    """Raise where folders are parts of one data set, such as train and val, and no classes.

    Parts are two folders or more with such names, or folders all of which have such names. Names
    in `classes` are classes.

    Raises:
        ValueError: The message names the folder to choose.
    """
    parts = [name for name in folders if name.lower() in SPLITS and name not in (classes or ())]
    if not parts or (len(parts) == 1 and len(folders) > 1):
        return
    rank = {name: place for place, name in enumerate(("val", "valid", "validation", "test"))}
    best = min(parts, key=lambda name: (rank.get(name.lower(), len(rank)), name))
    raise ValueError(
        f"`data` must be the part to be shown, but {root} holds {', '.join(sorted(parts))}, which "
        f"are parts of one data set and neither domains nor classes: choose one, such as "
        f"{Path(root) / best}"
    )


def are_classes(
    folders: Collection[str], classes: Sequence[str] | None, num_classes: int | None
) -> bool:
    """Whether folders are a model's classes by their names or number, whatever lies in them."""
    if classes is not None:
        return set(folders) <= set(classes)
    try:
        return num_classes is not None and bool(label_order(folders, num_classes))
    except ValueError:
        return False


def list_domains(root: str | Path) -> dict[str, set[str]]:
    """The class folders of each domain of ``root/<domain>/<class>/<image>``; empty for another.

    Domains hold no images themselves and share classes, which a class in several folders does not.
    """
    domains = {name: list_folders(Path(root, name)) for name in list_folders(Path(root))}
    nested = all(domains.values()) and not any(has_pictures(Path(root, name)) for name in domains)
    shared = set.intersection(*domains.values()) if domains else set()
    return dict(sorted(domains.items())) if nested and shared else {}


def list_imagenet_c(root: str | Path, flat: bool = False) -> list[str]:
    """The corruptions that an ImageNet-C folder has, alphabetically.

    Args:
        root: The folder.
        flat: Whether severities hold pictures, and no class folders.
    """
    return sorted({path.parent.name for path in _severities(Path(root), flat)})


def list_severities(
    root: str | Path, corruption: str | None = None, flat: bool = False
) -> list[int]:
    """The severities that an ImageNet-C folder has, of one corruption or of any, ascending."""
    found = _severities(Path(root), flat)
    return sorted({int(p.name) for p in found if corruption in (None, p.parent.name)})


def _severities(root: Path, flat: bool) -> list[Path]:
    """The folders of severities in ``root/<corruption>/`` and ``root/<group>/<corruption>/``."""
    found = [path for path in (*root.glob("*/[1-5]"), *root.glob("*/*/[1-5]")) if path.is_dir()]
    # A class that is called 3 holds images, a severity holds classes.
    return [path for path in found if (has_pictures(path) if flat else list_folders(path))]


def read_imagenet_c(
    root: str | Path,
    corruption: str,
    severity: int,
    size: int = 224,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    *,
    labels: str | Path | None = None,
    on_error: OnError = "raise",
) -> FolderSet:
    """Read ``root/<corruption>/<severity>/<class>/<image>``.

    The archives' own grouping, ``root/<noise|blur|...>/<corruption>/...``, is read as well.

    Args:
        root: The ImageNet-C folder.
        corruption: For example "gaussian_noise".
        severity: 1 to 5.
        size: Height and width of the images given out; the published ones are 224.
        classes: See `read_folder`.
        num_classes: See `read_folder`.
        labels: See `read_folder`, for ``root/<corruption>/<severity>/<image>``.
        on_error: See `FolderSet`.
    """
    if severity not in range(1, 6):
        raise ValueError(f"`severity` must be an integer in 1..5, got {severity}")
    root, flat = Path(root), labels is not None
    found = [root / corruption, *sorted(root.glob(f"*/{corruption}"))]
    folder = next((path for path in found if path.is_dir()), None)
    if folder is None:
        have = ", ".join(list_imagenet_c(root, flat)) or "none"
        raise FileNotFoundError(
            f"`{root / corruption}` is missing: unpack that part of ImageNet-C into {root}, whose "
            f"corruptions are: {have}"
        )
    severities = list_severities(root, corruption, flat)
    if severity not in severities:
        have = ", ".join(map(str, severities)) or "none"
        raise FileNotFoundError(
            f"`{folder / str(severity)}` is missing: ask for a severity that {corruption} has "
            f"there ({have}), or write or unpack that one"
        )
    return read_folder(
        folder / str(severity),
        size,
        classes,
        num_classes=num_classes,
        labels=labels,
        on_error=on_error,
    )


@cache  # asked for again with every domain and severity
def _wordnet_ids(num_classes: int | None) -> tuple[str, ...]:
    """Those of ImageNet's models with so many classes, in label order; none for other numbers."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return () if subset is None else tuple(ImageNetInfo(subset).label_names())


def list_folders(root: Path) -> set[str]:
    """Sub-folders that people made: not .git, .ipynb_checkpoints, __MACOSX and the like."""
    hidden = (".", "__")
    return {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(hidden)}


def has_pictures(root: Path) -> bool:
    """Whether a folder holds pictures itself."""
    return any(is_picture(path) and path.is_file() for path in root.iterdir())


def _why_unreadable(path: str) -> str | None:
    """Why a picture cannot be read; None for one that can."""
    try:
        read_picture(path)
    except (UnreadablePictureError, PermissionError) as error:
        return str(error)
    return None
