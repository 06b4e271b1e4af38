"""Rows of a table that is measured bit by bit: one JSON object a line, found by some of its fields.

A study that is stopped keeps what it has, and measures what is left when it is started again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.records import markdown
from tta.core.files import replacing

__all__ = ["Rows"]


class Rows:
    """The rows of a file.

    Args:
        path: Of the file, which need not be there yet.
        keys: Fields that tell rows apart.

    Raises:
        ValueError: When the file holds something else.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path, self.keys = path, tuple(keys)
        lines = path.read_text().splitlines() if path.is_file() else []
        try:
            self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
            self._places = {self._key(row): at for at, row in enumerate(self.rows)}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"`{path}` must hold rows with {', '.join(self.keys)}, but does not: restore it, "
                "or remove it to measure all again"
            ) from error

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of this key, if it was measured."""
        at = self._places.get(self._key(key))
        return None if at is None else self.rows[at]

    def measured(self, key: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
        """Whether the row of this key is there, with the same values of ``about``."""
        row = self.get(key)
        return row is not None and all(row[name] == value for name, value in about.items())

    @contextmanager
    def shown_on(
        self, page: Path, mark: str, render: Callable[[Sequence[dict[str, Any]]], str]
    ) -> Iterator[None]:
        """Write the rows to a page when the block ends, by whatever: what is measured is shown.

        Args:
            page: Its file.
            mark: Of the generated part.
            render: Gives that part.
        """
        try:
            yield
        finally:
            markdown.write_between(page, mark, render(self.rows))
        print(f"{self.path}\n{page}")

    def fill(
        self,
        keys: Iterable[Mapping[str, Any]],
        about: Mapping[str, Any],
        measure: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        again: bool,
    ) -> None:
        """Measure what is left, and print each row as it comes.

        Args:
            keys: Of the rows.
            about: Fields that all of them have.
            measure: Gives the other fields of a key's row.
            again: Whether rows that are there are measured again.
        """
        for key in keys:
            if again or not self.measured(key, about):
                row = {**key, **about, **measure(key)}
                self.put(row)
                print(row, flush=True)

    def put(self, row: Mapping[str, Any]) -> None:
        """Add a row, or replace the one of its key, and write the file."""
        at = self._places.setdefault(self._key(row), len(self.rows))
        self.rows[at : at + 1] = [dict(row)]
        with replacing(self.path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.keys)
