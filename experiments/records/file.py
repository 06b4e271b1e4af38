"""The folder of one run, and its results as JSON lines that survive a kill.

``results.jsonl`` is append-only. Every line is a JSON object with a ``kind``: one ``run`` line
(what was run, on what); for each stream a ``stream`` line (the arguments that make it again); for
each method ``method`` (the adapter's configuration), ``batch``, ``domain`` and ``summary`` lines;
``continued`` where a killed run went on, and ``end``, which is the last line of a whole run. Errors
are shares in [0, 1]; a figure that does not exist is null. Each line has a check, see
`experiments.records.lines`.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from experiments.records.errors import CannotGoOn
from experiments.records.lines import encode, mend, next_number, split
from tta.core.files import replacing

__all__ = [
    "END",
    "RESULTS",
    "Busy",
    "Conflict",
    "JsonLines",
    "Results",
    "is_file_name",
    "make_run_folder",
    "plain",
    "read_header",
    "read_lines",
    "stretches",
]

RESULTS = "results.jsonl"
END = "end"  # kind of the last line of a whole run
KEYS = ("kind", "stream", "method", "step", "domain")  # what makes a line the same line


class Busy(CannotGoOn):
    """Another process is writing the file."""


def is_file_name(text: str) -> bool:
    """Whether a text can be the name of a file or a folder, and not a path to elsewhere."""
    return text not in ("", ".", "..") and not set(text) & set("/\\\0")


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

    What a killed process left, or has been damaged since, is repaired first, see `mend`;
    ``repaired`` says how many lines that concerned.

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
        self._number = next_number(mended)  # of the next line
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
        data = encode(rows, self._number)
        self._number += len(rows)
        while data:  # a disk that is nearly full takes a part
            data = data[os.write(self._file, data) :]

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
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._last = ""
        for row in read_lines(self.path):
            self._rows[_key(row)], self._last = row, row["kind"]

    @property
    def ended(self) -> bool:
        """Whether the last line says that the run is whole."""
        return self._last == END

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

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        super()._append(rows)
        self._last = rows[-1]["kind"]

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
    """The objects of a results file, or those of one kind.

    Raises:
        ValueError: At a line that is not whole.
    """
    for number, (_, row) in enumerate(split(Path(path).read_bytes()), 1):
        if row is None:
            raise ValueError(
                f"`{path}` must hold whole lines, each once, but line {number} is cut off, changed "
                "or a copy: continue the run with --resume, which repairs the file and runs again "
                "what is lost"
            )
        if kind is None or row["kind"] == kind:
            yield row


def read_header(folder: str | Path) -> dict[str, Any] | None:
    """The ``run`` line of a run's folder; None where there is none that can be read."""
    path = Path(folder) / RESULTS
    if not path.is_file():
        return None
    rows = (row for _, row in split(path.read_bytes()) if row is not None)
    return next((row for row in rows if row["kind"] == "run"), None)


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
