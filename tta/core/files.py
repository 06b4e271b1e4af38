"""Files that are replaced in one step: whoever reads one finds the former content or the new."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["PART", "part_of", "replacing"]

PART = ".part"  # ends the name of a file that is being written


def part_of(path: Path) -> Path:
    """The name beside ``path`` under which its next content is written."""
    return path.with_name(path.name + PART)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file under another name and give it its own name in the end.

    Whoever reads ``path`` finds the former content until the block ends and the new content
    afterwards, never a part of it. When the block raises, ``path`` stays as it was and the
    unfinished file is removed.

    Args:
        path: The file; its folder must exist.

    Yields:
        The path to write to.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> with replacing(folder / "a.txt") as part:
        ...     _ = part.write_text("all of it")
        >>> [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    path = Path(path)
    part = part_of(path)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
