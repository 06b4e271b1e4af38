"""`open_data`: one name or path, whatever kind of data lies there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.data.bundled import read_bundled
from experiments.data.cifar import list_cifar_c, read_cifar, read_cifar_c, read_npz
from experiments.data.folders import (
    are_classes,
    label_order,
    list_domains,
    list_imagenet_c,
    read_folder,
    read_imagenet_c,
)
from experiments.data.image_set import LabelledSet

__all__ = ["Collection", "open_data"]

LAYOUTS = (
    "'bundled', a CIFAR-10 .npz, a folder with cifar-10-batches-py or cifar-100-python, a "
    "CIFAR-C folder of .npy files, an ImageNet-C folder, a folder with one folder per class, or "
    "one with such a folder per domain"
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
) -> Collection:
    """Find out what kind of data `where` is and open it.

    Args:
        where: "bundled", or a path of one of the layouts in `experiments.data`.
        size: Height and width to bring files in folders to.
        classes: Class folder names in label order, see `read_folder`.
        num_classes: Of the model that is shown them, see `label_order`.
    """
    if str(where) == "bundled":
        return Collection("cifar10-test-2000", read_bundled())
    path = Path(os.path.abspath(where))  # "." has no name
    if not path.exists():
        raise FileNotFoundError(f"`{path}` is missing: data must be {LAYOUTS}")
    if path.is_file():
        return Collection(path.stem, read_npz(path))
    if (path / "cifar-10-batches-py").is_dir() or path.name == "cifar-10-batches-py":
        return Collection("cifar10-test", read_cifar(path, "cifar10"))
    if (path / "cifar-100-python").is_dir() or path.name == "cifar-100-python":
        return Collection("cifar100-test", read_cifar(path, "cifar100"))
    if list_cifar_c(path):
        names = tuple(list_cifar_c(path))
        return Collection(path.name, None, names, lambda name, s: read_cifar_c(path, name, s))
    if list_imagenet_c(path):
        return Collection(
            path.name,
            None,
            tuple(list_imagenet_c(path)),
            lambda name, s: read_imagenet_c(path, name, s, size, classes, num_classes),
            files=True,
        )
    domains = list_domains(path)
    if domains and not are_classes(domains, classes, num_classes):
        order = classes or label_order(set().union(*domains.values()), num_classes)
        return Collection(
            path.name,
            None,
            tuple(domains),
            lambda name, s: read_folder(path / name, size, order),
            files=True,
        )
    if any(child.is_dir() for child in path.iterdir()):
        clean = read_folder(path, size, classes, num_classes=num_classes)
        return Collection(path.name, clean, files=True)
    raise ValueError(f"`{path}` holds no data that is known here: it must be {LAYOUTS}")
