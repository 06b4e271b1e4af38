"""``tta collect``: what methods need from the training data, made from a folder, in one file."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tta.cli.common import add_model, open_from, whole
from tta.core.checks import nearest, shown, told
from tta.core.files import replacing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tta.runtime.model_strings import Transform

__all__ = ["add_arguments", "run"]

BATCH_SIZE = 64
MOST_IMAGES = 2000  # as EATA's authors take for Fisher information


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_model(parser, BATCH_SIZE)
    add = parser.add_argument
    add(
        "images",
        metavar="FOLDER",
        help="pictures like those of the training data, with a subfolder for each class; one "
        "without subfolders serves methods that need no labels",
    )
    add(
        "--for",
        dest="methods",
        nargs="+",
        required=True,
        metavar="METHOD",
        help="components or presets that the artefacts are for, such as eata",
    )
    add("--out", required=True, metavar="FILE", help="a .safetensors file, for --source FILE")
    add(
        "--images",
        dest="most",
        type=whole(1),
        default=MOST_IMAGES,
        metavar="N",
        help=f"pictures that are read, at most, as many of each class (default: {MOST_IMAGES})",
    )


def run(args: argparse.Namespace) -> int:
    """Collect the artefacts and write them.

    Raises:
        ValueError: When the folder does not fit the model or the methods.
    """
    from tta.collect import collect_source
    from tta.core.registry import get_config, list_methods

    names = [name for text in args.methods for name in text.split(",") if name]
    for name in names:
        if name not in list_methods("*") and name not in list_methods("*.*"):
            raise ValueError(f"`--for` must name methods, got {shown(name)}: "
                             + nearest(name, list_methods("*")))  # fmt: skip
        get_config(name)
    out = Path(args.out)
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"`out` must be in a folder that is there, but {told(out.absolute().parent)} is not: "
            "make it."
        )
    files = _files(Path(args.images))
    opened = open_from(args)
    labels = _labels(files, opened.model, opened.class_names, names)
    chosen = _chosen(files, labels, args.most, args.seed)
    device = next(opened.model.parameters()).device
    loader = _Loader(chosen, opened.transform, args.batch_size, device)
    found = collect_source(opened.model, loader, names)
    loader.end()
    if not set(found.contents) - {"batches"}:
        raise ValueError(
            f"`--for` must name methods that need something that a file can hold, got "
            f"{told(', '.join(names))}: leave --source out for these."
        )
    with replacing(out) as part:
        found.save(part)
    print(f"{', '.join(found.contents)} from {len(chosen):,} pictures in {out}")
    return 0


def _files(folder: Path) -> dict[str, list[str]]:
    """Pictures by class folder; by "" where there are none."""
    from tta.runtime.frames import listed

    if not folder.is_dir():
        raise FileNotFoundError(
            f"`FOLDER` must be a folder of pictures, but {told(folder)} is none: check the path."
        )
    found: dict[str, list[str]] = {}
    for path, _ in listed(folder):
        inner = Path(path).relative_to(folder).parts
        found.setdefault(inner[0] if len(inner) > 1 else "", []).append(path)
    if not found:
        raise ValueError(
            f"`FOLDER` must hold pictures, but {told(folder)} has none: check the path."
        )
    if len(found) > 1:
        found.pop("", None)  # beside class folders, a preview or the like
    return found


def _labels(
    files: dict[str, list[str]], model: Any, names: Sequence[str] | None, methods: Sequence[str]
) -> dict[str, int]:
    """The label of each class folder: by the model's names, by number, or by place."""
    from tta.core.classifier import num_classes

    folders, classes = sorted(files), num_classes(model)
    if folders == [""]:
        _check_unlabelled(methods)
        return {"": 0}
    if names is not None and set(folders) <= set(names):
        return {folder: list(names).index(folder) for folder in folders}
    if all(f.isdecimal() and int(f) < classes for f in folders):
        return {folder: int(folder) for folder in folders}
    if len(folders) == classes:
        return {folder: label for label, folder in enumerate(folders)}
    raise ValueError(
        f"`FOLDER` must have a subfolder for each of {classes} classes, or some by the classes' "
        f"names or numbers, got {len(folders)} such as {shown(folders[0], 60)}: rename them, or "
        "pass --classes FILE."
    )


def _check_unlabelled(methods: Sequence[str]) -> None:
    """Refuse a folder without labels where a method reads these."""
    from tta.core.component import Component
    from tta.core.registry import component

    for name in methods:
        method = component(name.partition(".")[0])
        reads = method.source_artefacts is not Component.source_artefacts
        if reads and method.uses_labels:
            raise ValueError(
                f"`FOLDER` must have a subfolder for each class, as {name} reads labels, got "
                "pictures alone: sort them into folders."
            )


def _chosen(
    files: dict[str, list[str]], labels: dict[str, int], most: int, seed: int
) -> list[tuple[str, int]]:
    """Pictures with their labels in a random order, as many of each class as there can be."""
    chance = random.Random(seed)
    lines = {folder: chance.sample(paths, len(paths)) for folder, paths in sorted(files.items())}
    found: list[tuple[str, int]] = []
    for place in range(max(map(len, lines.values()))):
        found += [(paths[place], labels[f]) for f, paths in lines.items() if place < len(paths)]
        if len(found) >= most:
            break
    found = found[:most]
    chance.shuffle(found)
    return found


class _Loader:
    """Batches of pictures with their labels, as often as asked; what cannot be read is left out."""

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        transform: Transform,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.files, self.transform = files, transform
        self.batch_size, self.device = batch_size, device
        self.unreadable: set[str] = set()
        self._drawn = 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        import torch

        images: list[Tensor] = []
        labels: list[int] = []
        for number, (path, label) in enumerate(self.files, 1):
            image = self._read(path)
            if image is not None:
                images.append(image)
                labels.append(label)
            if images and (len(images) == self.batch_size or number == len(self.files)):
                yield torch.stack(images).to(self.device), torch.tensor(labels, device=self.device)
                images, labels = [], []
            self._progress(number)

    def end(self) -> None:
        """Say what was left out."""
        if self.unreadable:
            first = told(min(self.unreadable), 100)
            print(
                f"warning: {len(self.unreadable)} pictures that cannot be read were left out, "
                f"such as {first}",
                file=sys.stderr,
            )

    def _read(self, path: str) -> Tensor | None:
        from tta.runtime.frames import read_picture

        if path in self.unreadable:
            return None
        try:
            return self.transform(read_picture(path))
        except (ValueError, OSError):
            self.unreadable.add(path)
            if len(self.unreadable) == len(self.files):
                raise
            return None

    def _progress(self, number: int) -> None:
        if sys.stderr.isatty() and time.monotonic() - self._drawn > 0.25:
            self._drawn = time.monotonic()
            print(f"\r\x1b[K{number:,} of {len(self.files):,}\r", end="", file=sys.stderr)
