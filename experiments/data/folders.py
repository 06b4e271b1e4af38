"""Images in folders, one folder per class: ImageNet-C and anything shaped like it.

Images are decoded when they are asked for; nothing is kept in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from experiments.data.image_set import balanced_positions

__all__ = [
    "FolderSet",
    "label_order",
    "list_domains",
    "list_imagenet_c",
    "read_folder",
    "read_imagenet_c",
]


class FolderSet:
    """Labelled image files, decoded on access.

    Args:
        files: (path, label) of each image.
        classes: Class names in label order.
        origin: What the images are, in words, for results files.
        size: Height and width every image is brought to: the shorter side is resized to
            `size / crop`, then the middle is cut out. Images of that size already are not touched.
        crop: Share of the resized image that is kept; 0.875 is usual for ImageNet.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        classes: Sequence[str],
        origin: str,
        size: int = 224,
        crop: float = 0.875,
    ) -> None:
        self.files = list(files)
        self.classes = tuple(classes)
        self.origin = origin
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
        try:
            picture = datasets.folder.pil_loader(path)
        except OSError as error:
            raise OSError(
                f"`{path}` cannot be decoded ({error}): fetch it again or remove it"
            ) from error
        if picture.size != (self.size, self.size):
            picture = self._resize(picture)
        return v2.functional.pil_to_tensor(picture), label

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
) -> FolderSet:
    """Read ``root/<class>/<image>``.

    Args:
        root: The folder; its sub-folders are the classes.
        size: Height and width of the images given out.
        classes: Folder names in label order, for sets that have only some of a model's classes
            (ImageNet-R has 200 of 1,000). Default: see `label_order`.
        crop: See `FolderSet`.
        num_classes: Of the model, see `label_order`.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"`{root}` is missing: expected a folder with one folder per class")
    try:
        found = _ClassFolders(str(root))
    except FileNotFoundError as error:  # no class folders, or one without images
        raise FileNotFoundError(
            f"`{root}` must hold one folder of images per class, but {_first_line(error)}"
        ) from error
    if classes is None:
        classes = label_order(found.classes, num_classes)
    unknown = sorted(set(found.classes) - set(classes))
    if unknown:
        raise ValueError(
            f"`{root}` has folders that are not among the {len(classes)} classes "
            f"({', '.join(unknown[:3])}): remove them or pass the right `classes`"
        )
    label_of = {name: label for label, name in enumerate(classes)}
    files = [(path, label_of[found.classes[label]]) for path, label in found.samples]
    return FolderSet(files, classes, str(root), size, crop)


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
    domains = {name: _folders(Path(root, name)) for name in _folders(Path(root))}
    nested = all(domains.values()) and not any(_has_images(Path(root, name)) for name in domains)
    shared = set.intersection(*domains.values()) if domains else set()
    return dict(sorted(domains.items())) if nested and shared else {}


def list_imagenet_c(root: str | Path) -> list[str]:
    """The corruptions that an ImageNet-C folder has, alphabetically."""
    root = Path(root)
    severities = [*root.glob("*/[1-5]"), *root.glob("*/*/[1-5]")]
    # A class that is called 3 holds images, a severity holds classes.
    return sorted({path.parent.name for path in severities if path.is_dir() and _folders(path)})


def read_imagenet_c(
    root: str | Path,
    corruption: str,
    severity: int,
    size: int = 224,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
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
    """
    if severity not in range(1, 6):
        raise ValueError(f"`severity` must be an integer in 1..5, got {severity}")
    root = Path(root)
    found = [root / corruption, *sorted(root.glob(f"*/{corruption}"))]
    folder = next((path for path in found if path.is_dir()), None)
    if folder is None:
        have = ", ".join(list_imagenet_c(root)) or "none"
        raise FileNotFoundError(
            f"`{root / corruption}` is missing: unpack that part of ImageNet-C into {root}, whose "
            f"corruptions are: {have}"
        )
    return read_folder(folder / str(severity), size, classes, num_classes=num_classes)


@cache  # asked for again with every domain and severity
def _wordnet_ids(num_classes: int | None) -> tuple[str, ...]:
    """Those of ImageNet's models with so many classes, in label order; none for other numbers."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return () if subset is None else tuple(ImageNetInfo(subset).label_names())


def _folders(root: Path) -> set[str]:
    """Sub-folders that people made: not .git, .ipynb_checkpoints, __MACOSX and the like."""
    hidden = (".", "__")
    return {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(hidden)}


class _ClassFolders(datasets.ImageFolder):
    """Files and labels of ``root/<class>/<image>``."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The names of class folders, and a number for each."""
        names = sorted(_folders(Path(directory)))
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return names, {name: number for number, name in enumerate(names)}


def _has_images(root: Path) -> bool:
    return any(datasets.folder.is_image_file(path.name) for path in root.iterdir())


def _first_line(error: Exception) -> str:
    message = str(error).splitlines()[0]
    return message[:1].lower() + message[1:].rstrip(".")
