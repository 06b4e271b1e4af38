"""The folder of one run: results as JSON lines, TensorBoard events, plots.

``results.jsonl`` is append-only. Every line is a JSON object with a ``kind``: one ``run`` line
(what was run, on what); for each stream a ``stream`` line (the arguments that make it again); and
for each method ``method`` (the adapter's configuration), ``batch``, ``domain`` and ``summary``
lines. Errors are shares in [0, 1]; a figure that does not exist is null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

__all__ = ["JsonLines", "make_run_folder", "read_lines"]


def make_run_folder(root: str | Path, name: str) -> Path:
    """Make ``root/<date>-<name>``, with ``-2``, ``-3``, ... where that is taken."""
    stem = Path(root) / f"{date.today().isoformat()}-{name}"
    folder, number = stem, 1
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # maybe by another process just now: never check first
            number += 1
            folder = stem.with_name(f"{stem.name}-{number}")
        else:
            return folder


class JsonLines:
    """Appends objects to a file, each as one line in one write.

    A reader, or a run killed at any moment, sees whole lines only: the operating system appends a
    short write in one piece.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, kind: str, **fields: Any) -> None:
        """Append ``{"kind": kind, **fields}``; NaN and infinity become null."""
        text = json.dumps(_plain({"kind": kind, **fields}), allow_nan=False) + "\n"
        os.write(self._file, text.encode())

    def close(self) -> None:
        """Close the file; nothing is written afterwards."""
        os.close(self._file)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: str | Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a results file, or those of one kind."""
    with Path(path).open() as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"`{path}` must hold one JSON object per line, but line {number} is not one: "
                    "the run was cut off while writing; remove that line"
                ) from error
            if kind is None or row["kind"] == kind:
                yield row


def _plain(value: Any) -> Any:
    """`value` with floats that JSON cannot say as None, tuples as lists, paths as strings."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value
