"""Files that are replaced in one step: whoever reads one finds the former content or the new.

A file is written under another name beside its place, flushed to disk with its folder, and renamed.
While it is written, its writer holds a lock on it, which ends with the writer, however that dies.
So what a dead writer has left is distinguished from what a living one is writing, and is removed by
the next write.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from io import FileIO
from pathlib import Path

from tta.core.checks import is_final, shown, told

try:
    import fcntl
except ImportError:  # a system without such locks keeps leftovers
    fcntl = None

__all__ = ["leftovers_of", "not_writable", "remove_leftovers", "replacing", "replacing_together",
           "writing"]  # fmt: skip

PART = ".part"  # ends the name of a file that is being written
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file under another name and give it its own name in the end.

    Whoever reads ``path`` finds the former content until the block ends and the new content
    afterwards, never a part of it. When the block raises, ``path`` stays as it was and the
    unfinished file is removed. Where ``path`` is a link, the link is replaced.

    Args:
        path: The file; its folder must exist.

    Yields:
        The path to write to.

    Raises:
        OSError: When the folder cannot be written to.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> with replacing(folder / "a.txt") as part:
        ...     _ = part.write_text("all of it")
        >>> [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    with replacing_together(path) as (part,):
        yield part


@contextmanager
def replacing_together(*paths: str | Path) -> Iterator[list[Path]]:
    """Replace files of one folder that belong together, as :func:`replacing` does one.

    They get their names one after the other, in the order given, while other writers of the folder
    wait: of two writers, one replaces all files before the other replaces any.

    Args:
        *paths: The files; their folder must exist.

    Yields:
        The paths to write to.
    """
    places = [Path(path) for path in paths]
    for place in places:
        if place.exists() and not place.is_file():  # such as /dev/null, which would become a file
            raise FileExistsError(errno.EEXIST, "it is no file that can be replaced", str(place))
    folder = places[0].parent
    parts: list[tuple[Path, FileIO]] = []
    try:
        # A dead writer may have moved its first file and left the others, which belong to it: these
        # are needed until the first one is replaced.
        remove_leftovers(places[0])
        for place in places:
            parts.append(_new_part(place))
        yield [part for part, _ in parts]
        for part, _ in parts:
            _flush(part)
        with _alone_in(folder):
            try:
                for (part, _), place in zip(parts, places, strict=True):
                    os.replace(part, place)
            except BaseException:
                _finish([part for part, _ in parts], places)
                raise
            for place in places[1:]:
                remove_leftovers(place)
        with suppress(OSError):  # not every system opens folders
            _flush(folder)
    except BaseException:
        # Where the first one has its name already, the others that have not belong to it.
        if parts and parts[0][0].exists():
            for part, _ in parts:
                part.unlink(missing_ok=True)
        raise
    finally:
        for _, handle in parts:
            handle.close()


def _finish(parts: list[Path], places: list[Path]) -> None:
    """Give files their names, if the first one has got its own, as far as that can be done."""
    if not parts[0].exists():
        for part, place in zip(parts, places, strict=True):
            with suppress(OSError):
                os.replace(part, place)


@contextmanager
def writing(name: str, place: str | Path) -> Iterator[None]:
    """Say of what cannot be written within the block which argument named its place.

    Args:
        name: The argument.
        place: The file or the folder.

    Raises:
        OSError: In place of one that says no more than the system does.
        ValueError: When a name in what is written cannot be.
    """
    try:
        yield
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{name}` must get tensors under names of whole characters, got {shown(error.object)}:"
            " rename what it is of."
        ) from error
    except OSError as error:
        if is_final(error):
            raise
        raise not_writable(name, place, error) from error


def not_writable(name: str, place: str | Path, error: OSError) -> OSError:
    """The error of its kind that says in words what cannot be written to."""
    return type(error)(
        f"`{name}` must be one that can be written to, but {told(place)} is not "
        f"({told(error.strerror or error)}): choose another, or make room."
    )


def leftovers_of(path: str | Path) -> list[Path]:
    """Unfinished files of ``path``, of living writers and of dead ones."""
    path = Path(path)
    return sorted(path.parent.glob(f"{escape(path.name)}*{PART}"))


def remove_leftovers(path: str | Path) -> None:
    """Remove what dead writers of ``path`` have left."""
    for part in leftovers_of(path):
        # It may be a link, or belong to another user.
        with suppress(OSError), FileIO(part, "r+", opener=_open) as handle:
            if _lock(handle):
                part.unlink(missing_ok=True)


def _new_part(path: Path) -> tuple[Path, FileIO]:
    """A new file beside ``path``, and the handle that holds its lock.

    The handle is an object, since a signal may come before anybody has it: then it is closed as it
    is collected, and the file is a leftover that the next writer removes.
    """
    while True:
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}")
        handle = FileIO(part, "x+", opener=_open)
        # Another writer may have taken it for a leftover before it was locked.
        if _lock(handle) or fcntl is None:
            with suppress(FileNotFoundError):
                if os.stat(part).st_ino == os.fstat(handle.fileno()).st_ino:
                    return part, handle
        handle.close()


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | NO_LINKS, 0o666)


def _lock(handle: FileIO) -> bool:
    """Lock a file until the handle is closed; return whether the lock was free."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other writers from moving files into the folder within the block."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
