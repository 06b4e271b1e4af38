"""``tta collect``: what methods need from the training data, made from a folder, in one file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tta.cli.common import add_model, check_writable, open_from, whole
from tta.cli.pictures import PictureLoader, choose_pictures, picture_files
from tta.core.checks import nearest, new_file, shown, told

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
        action="extend",
        required=True,
        metavar="METHOD",
        help="components or presets that the artefacts are for, such as eata; may be repeated",
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
    out = new_file("out", args.out)
    check_writable("out", out)
    files = picture_files(Path(args.images))
    opened = open_from(args)
    given = args.classes is not None
    labels = _labels(files, opened.model, opened.class_names, names, given)
    chosen = choose_pictures(files, labels, args.most, args.seed)
    loader = PictureLoader(chosen, opened.transform, args.batch_size, opened.model)
    found = collect_source(opened.model, loader, names)
    loader.end()
    if not set(found.contents) - {"batches"}:
        raise ValueError(
            f"`--for` must name methods that need something that a file can hold, got "
            f"{told(', '.join(names))}: leave --source out for these."
        )
    found.save(out)
    read = len(chosen) - len(loader.unreadable)
    print(f"{', '.join(found.contents)} from {read:,} pictures in {out}")
    return 0


def _labels(
    files: dict[str, list[str]],
    model: Any,
    names: Sequence[str] | None,
    methods: Sequence[str],
    given: bool = False,
) -> dict[str, int]:
    """The label of each class folder: by the model's names, by number, or by place.

    Args:
        files: Pictures of each folder.
        model: The classifier.
        names: Of its classes.
        methods: For which artefacts are collected.
        given: Whether the caller gave the names, so that folders of other names are a mistake.
    """
    from tta.core.classifier import num_classes

    numbered = all(name.isdecimal() for name in files)
    folders, classes = sorted(files, key=int if numbered else None), num_classes(model)
    if folders == [""]:
        _check_unlabelled(methods)
        return {"": 0}
    if names is not None and set(folders) <= set(names):
        return {folder: list(names).index(folder) for folder in folders}
    if names is not None and given:
        other = sorted(set(folders) - set(names))
        raise ValueError(
            f"`FOLDER` must have subfolders by the names of classes, got {shown(other[0], 60)}: "
            + nearest(other[0], names)
        )
    if numbered and int(folders[-1]) < classes:
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
