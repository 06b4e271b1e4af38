"""`open_data`: one name or path, whatever kind of data lies there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from corruptions.pictures import OnError
from experiments.data.bundled import read_bundled
from experiments.data.cifar import (
    list_cifar_c,
    read_cifar,
    read_cifar_c,
    read_npz,
    written_severities,
)
from experiments.data.folders import (
    are_classes,
    has_pictures,
    label_order,
    list_domains,
    list_folders,
    list_imagenet_c,
    list_severities,
    read_folder,
    read_imagenet_c,
    refuse_splits,
)
from experiments.data.image_set import LabelledSet
from tta.core.checks import path_like

__all__ = ["Collection", "default_severity", "open_data"]

USUAL_SEVERITY = 5  # also the highest that there is
LAYOUTS = (
    "'bundled', a CIFAR-10 .npz, a folder with cifar-10-batches-py or cifar-100-python, a "
    "CIFAR-C folder of .npy files, an ImageNet-C folder, a folder with one folder per class, one "
    "with such a folder per domain, or a folder of pictures with a file of their labels"
)


@dataclass(frozen=True)
class Collection:
    """Clean images, shifted images on disk, or both.

    Args:
        name: Short, for tables and file names.
        clean: The unshifted images, or None where there are only shifted ones.
        stored: Names of the shifted domains on disk; empty where they are made from `clean`.
        read_stored: (domain, severity) to images, for a name in `stored`.
        files: Whether images are files, decoded when they are shown.
    """

    name: str
    clean: LabelledSet | None
    stored: tuple[str, ...] = ()
    read_stored: Callable[[str, int], LabelledSet] | None = None
    files: bool = False

    def as_shifted(self) -> Collection:
        """Its images as a domain of its own name, for clean images that lie elsewhere."""
        images = self.clean
        if images is None or self.stored:
            return self
        return replace(
            self, clean=None, stored=(self.name,), read_stored=lambda name, severity: images
        )


def open_data(
    where: str | Path,
    size: int = 224,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    *,
    labels: str | Path | None = None,
    on_error: OnError = "raise",
) -> Collection:
    """Find out what kind of data `where` is and open it.

    Args:
        where: "bundled", or a path of one of the layouts in `experiments.data`.
        size: Height and width to bring files in folders to.
        classes: Class folder names in label order, see `read_folder`.
        num_classes: Of the model that is shown them, see `label_order`.
        labels: A file with the label of each picture of a folder without class folders, see
            `experiments.data.labels.read_labels`.
        on_error: What to do about pictures that cannot be read, see `FolderSet`.

    Raises:
        FileNotFoundError: Where something is missing.
        ValueError: For data of no known layout, for parts of one data set such as train and val,
            or for labels where they are not needed.
    """
    path = Path(os.path.abspath(path_like("data", where)))  # "." has no name
    found = None
    if str(where) == "bundled":
        found = Collection("cifar10-test-2000", read_bundled())
    elif not path.exists():
        raise FileNotFoundError(f"`{path}` is missing: data must be {LAYOUTS}")
    else:
        found = _arrays(path)
    if found is not None:
        if labels is not None:
            raise ValueError(
                f"`labels` must come with a folder of pictures, but {where} has labels of its own: "
                "leave it out"
            )
        return found

    def read(part: Path, order: Sequence[str] | None = classes) -> LabelledSet:
        return read_folder(
            part, size, order, num_classes=num_classes, labels=labels, on_error=on_error
        )

    flat = labels is not None
    corruptions = list_imagenet_c(path, flat)
    if corruptions:
        return Collection(
            path.name,
            None,
            tuple(corruptions),
            lambda name, s: read_imagenet_c(
                path, name, s, size, classes, num_classes, labels=labels, on_error=on_error
            ),
            files=True,
        )
    if flat:
        return Collection(path.name, read(path), files=True)
    refuse_splits(path, list_folders(path), classes)
    domains = list_domains(path)
    if domains and not are_classes(domains, classes, num_classes):
        for name, folders in domains.items():
            refuse_splits(path / name, folders, classes)
        order = classes or label_order(set().union(*domains.values()), num_classes)
        return Collection(
            path.name, None, tuple(domains), lambda name, s: read(path / name, order), files=True
        )
    if list_folders(path):
        return Collection(path.name, read(path), files=True)
    if has_pictures(path):
        raise ValueError(
            f"`{path}` holds pictures without class folders, so nothing says their labels: put "
            "them into one folder per class, or give a file of their labels as `labels`"
        )
    raise ValueError(f"`{path}` holds no data that is known here: it must be {LAYOUTS}")


def _arrays(path: Path) -> Collection | None:
    """Data of arrays in files, which have their labels; None for other paths."""
    if path.is_file():
        if path.suffix == ".npy":
            raise ValueError(
                f"`data` must be the folder of a .npy file and its labels, got the file {path}: "
                f"pass {path.parent}"
            )
        return Collection(path.stem, read_npz(path))
    if (path / "cifar-10-batches-py").is_dir() or path.name == "cifar-10-batches-py":
        return Collection("cifar10-test", read_cifar(path, "cifar10"))
    if (path / "cifar-100-python").is_dir() or path.name == "cifar-100-python":
        return Collection("cifar100-test", read_cifar(path, "cifar100"))
    names = tuple(list_cifar_c(path))
    if not names:
        return None
    return Collection(path.name, None, names, lambda name, s: read_cifar_c(path, name, s))


def default_severity(where: str | Path, flat: bool = False) -> int:
    """The severity to show where nobody chose one: 5, or else the highest that the data has.

    Args:
        where: As in `open_data`; data that does not say which severities it has is shown at 5.
        flat: Whether severities hold pictures, and no class folders.
    """
    path = Path(os.path.abspath(path_like("data", where)))
    if str(where) == "bundled" or not path.is_dir():
        return USUAL_SEVERITY
    there: Sequence[int] = written_severities(path)
    if not there and not list_cifar_c(path):
        there = list_severities(path, flat=flat)
    return USUAL_SEVERITY if not there else max(there)
