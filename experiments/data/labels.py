"""Labels of pictures that lie in no class folders, from a text file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from corruptions.pictures import is_picture
from tta.core.checks import path_like, shown

__all__ = ["read_labels"]


def read_labels(
    path: str | Path,
    names: Sequence[str],
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> list[int]:
    """Read the label of each picture from a text file.

    A line holds a label, or the name of a picture and its label, with a space, a tab or a comma in
    between; further words are passed over, and so are empty lines and a first line that is a
    heading. Lines without names are in the order of the sorted names of the pictures. A label is
    the model's own number from 0, or a class name or WordNet id of `classes`. Pictures are found
    by their names without folder and suffix.

    Args:
        path: The file.
        names: Of the pictures, in the order of the result.
        classes: Class names in label order; None where only numbers are labels.
        num_classes: Of the model; None for any.

    Raises:
        FileNotFoundError: Where the file is missing.
        ValueError: For labels that do not fit the pictures or the model.
    """
    if not path_like("labels", path).is_file():
        raise FileNotFoundError(f"`labels` must be a text file, but {path} is not there")
    lines = [re.split(r"[\s,]+", line.strip()) for line in Path(path).read_text().splitlines()]
    lines = [words for words in lines if words != [""]]
    label_of = {name: label for label, name in enumerate(classes or ())}
    named = any(len(words) > 1 for words in lines)
    place = 1 if named else 0
    if lines and len(lines) > len(names) and _number(lines[0][place:], label_of) is None:
        lines = lines[1:]  # a heading
    found = {}
    numbers = []
    for words in lines:
        number = _number(words[place:], label_of)
        if number is None:
            raise ValueError(
                f"`labels` must hold numbers{' or class names' if label_of else ''}, but {path} "
                f"has the line {shown(' '.join(words), 60)}: write a label, or a picture's name "
                "and "
                "its label, on each line"
            )
        numbers.append(number)
        found[_stem(words[0])] = number
    if not named and len(numbers) != len(names):
        raise ValueError(
            f"`labels` must hold one label for each of the {len(names)} pictures, but {path} has "
            f"{len(numbers)}: write the pictures' names before the labels where some are missing"
        )
    if named:
        twice = len(names) - len({_stem(name) for name in names})
        if twice:
            raise ValueError(
                f"`labels` must tell pictures by their names, but {twice} of {len(names)} have the "
                "name of another one in another folder or format: rename them, or leave the names "
                f"out of {path}"
            )
        missing = [name for name in names if _stem(name) not in found]
        if missing:
            raise ValueError(
                f"`labels` must name all {len(names)} pictures, but {path} lacks {len(missing)} of "
                f"them, such as {missing[0]}: add a line for each"
            )
        numbers = [found[_stem(name)] for name in names]
    most = num_classes if num_classes is not None else max(numbers) + 1
    if min(numbers) < 0 or max(numbers) >= most:
        hint = "take the labels of the model"
        if min(numbers) == 1 and max(numbers) == most:
            hint = (
                "count from 0 in the order of the model's classes, which the numbers in ImageNet's "
                "own development kit do not have, or write WordNet ids"
            )
        raise ValueError(
            f"`labels` must be class numbers in 0..{most - 1}, but {path} has "
            f"{min(numbers)}..{max(numbers)}: {hint}"
        )
    return numbers


def _number(words: Sequence[str], label_of: dict[str, int]) -> int | None:
    """The label that begins with the first word, or None for no label."""
    if not words:
        return None
    if words[0] in label_of:
        return label_of[words[0]]
    joined = " ".join(words)  # class names of several words
    if joined in label_of:
        return label_of[joined]
    return int(words[0]) if re.fullmatch(r"[+-]?\d+", words[0]) else None


def _stem(name: str) -> str:
    """A picture's name without folder and suffixes; the writer of corruptions adds a second one."""
    stem = re.split(r"[/\\]", name)[-1]
    while is_picture(stem):
        stem = stem.rpartition(".")[0]
    return stem
