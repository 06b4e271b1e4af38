"""The folder of one run, and its results as JSON lines that survive a kill.

``results.jsonl`` is append-only. Every line is a JSON object with a ``kind``: one ``run`` line
(what was run, on what); for each stream a ``stream`` line (the arguments that make it again); for
each method ``method`` (the adapter's configuration), ``batch``, ``domain`` and ``summary`` lines;
``continued`` where a killed run went on, and ``end``. Errors are shares in [0, 1]; a figure that
does not exist is null.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from experiments.records.errors import CannotGoOn
from tta.core.files import replacing

__all__ = [
    "RESULTS",
    "Busy",
    "Conflict",
    "JsonLines",
    "Results",
    "make_run_folder",
    "mend",
    "plain",
    "read_header",
    "read_lines",
    "stretches",
]

RESULTS = "results.jsonl"
KEYS = ("kind", "stream", "method", "step", "domain")  # what makes a line the same line


class Busy(CannotGoOn):
    """Another process is writing the file."""


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


class Conflict(CannotGoOn):
    """What is run does not fit to what is in the file."""


class JsonLines:
    """Appends objects to a file, each as one line; one process at a time.

    What a killed process left is repaired first, see `mend`; ``repaired`` says how many
    lines that concerned.

    Args:
        path: Made if it is not there.

    Raises:
        Busy: Another process has it open.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.repaired = 0
        self._file = _open_locked(self.path)
        mended, count = mend(self.path.read_bytes())
        if count:
            with replacing(self.path) as part:  # in one step: a kill here loses nothing either
                part.write_bytes(mended)
            os.close(self._file)
            self._file = _open_locked(self.path)
            self.repaired = count

    def write(self, kind: str, **fields: Any) -> None:
        """Append ``{"kind": kind, **fields}``; NaN and infinity become null."""
        self._append([plain({"kind": kind, **fields})])

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        os.write(self._file, text.encode())

    def close(self) -> None:
        """Close the file; nothing is written afterwards."""
        os.close(self._file)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Results(JsonLines):
    """A run's results file, which may hold the first part of the run already.

    Lines are known by kind, stream, method, step and domain. One that is there is not written
    again, so that a run may repeat what it did before it was killed.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._rows = {_key(row): row for row in read_lines(self.path)}

    def find(self, kind: str, **key: Any) -> dict[str, Any] | None:
        """The line of that kind and key, if it is there."""
        return self._rows.get(_key({"kind": kind, **key}))

    def of(self, kind: str, stream: str, method: str) -> list[dict[str, Any]]:
        """The lines of a kind that a method wrote on a stream, in order of writing."""
        wanted = {"kind": kind, "stream": stream, "method": method}
        return [row for row in self._rows.values() if wanted.items() <= row.items()]

    def add(self, kind: str, **fields: Any) -> None:
        """Append a line whether there is one like it or not."""
        super().write(kind, **fields)

    def write(self, kind: str, **fields: Any) -> None:
        """Append a line unless it is there.

        Raises:
            Conflict: When it is there with another number of errors.
        """
        self.write_all(kind, [fields])

    def write_all(self, kind: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append those of some lines that are not there, in one write.

        Raises:
            Conflict: As `write`; the lines before are written.
        """
        new: list[dict[str, Any]] = []
        try:
            for fields in lines:
                row = plain({"kind": kind, **fields})
                held = self._rows.setdefault(_key(row), row)
                if held is row:
                    new.append(row)
                elif held.get("errors") != row.get("errors"):
                    where = ", ".join(f"{k} {row[k]}" for k in KEYS if k in row)
                    raise Conflict(
                        f"`{self.path}` was begun by a run that gave other numbers ({where}: "
                        f"{held.get('errors')} errors then, {row.get('errors')} now): code, data "
                        "or machine have changed; start a new run"
                    )
        finally:
            if new:
                self._append(new)


def read_lines(path: str | Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a results file, or those of one kind."""
    with Path(path).open() as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"`{path}` must hold one JSON object per line, but line {number} is not one: "
                    "the run was cut off while writing; continue it with --resume, which repairs "
                    "the file"
                ) from error
            if kind is None or row["kind"] == kind:
                yield row


def read_header(folder: str | Path) -> dict[str, Any] | None:
    """The ``run`` line of a run's folder; None where there is none that can be read."""
    path = Path(folder) / RESULTS
    if not path.is_file():
        return None
    for line in path.read_bytes().splitlines():
        row = _parse(line)
        if row is not None and row["kind"] == "run":
            return row
    return None


def mend(data: bytes) -> tuple[bytes, int]:
    """Turn what is no whole line of a results file into ``repaired`` lines that quote it.

    Returns:
        The mended file, and how many lines were not whole.
    """
    lines = data.split(b"\n")
    cut = lines.pop()  # empty, unless the last line was cut off
    mended: list[bytes] = []
    count = 0
    whole = len(lines)
    if cut:
        lines.append(cut)
    for number, line in enumerate(lines):
        if number == whole or _parse(line) is None:
            quoted = {"kind": "repaired", "step": number, "text": line.decode(errors="replace")}
            line, count = json.dumps(quoted).encode(), count + 1
        mended.append(line + b"\n")
    return b"".join(mended), count


def stretches(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, str]]:
    """(first image, one past the last, domain) of each stretch of one domain in batch lines."""
    found: list[tuple[int, int, str]] = []
    start = 0
    for row in rows:
        stop = start + row["images"]
        if found and found[-1][2] == row["domain"]:
            found[-1] = (found[-1][0], stop, row["domain"])
        else:
            found.append((start, stop, row["domain"]))
        start = stop
    return found


def plain(value: Any) -> Any:
    """`value` with floats that JSON cannot say as None, tuples as lists, paths as strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def _open_locked(path: Path) -> int:
    """Open for appending, for this process alone; the lock goes with the process."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise Busy(f"`{path}` is being written by another process: wait for it") from None
    return file


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEYS)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "kind" in row else None
