"""Frames and where they come from: iterables and folders of pictures; `tta.runtime.video` has more.

A source is iterated in a thread of its own. It gives a :class:`Frame` for each image, whose picture
is decoded later by other threads, and a :class:`Failure` for each error that it outlives.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tta.core.checks import shown, told
from tta.core.pictures import as_rgb, is_picture
from tta.runtime.extras import needed

__all__ = ["EXTRA", "PICTURES", "Failure", "FolderSource", "Frame", "IterableSource", "Several",
           "Source", "listed", "read_picture"]  # fmt: skip

EXTRA = "video"
PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SETTLED_S = 0.25  # a file that has not changed for so long is whole
POLL_S = 0.05
TRIES = 10  # errors in a row after which an iterator is given up
ONLY = "0"  # the stream of images that come without a name


@dataclass
class Frame:
    """One image of a stream.

    Args:
        stream: Its name.
        image: A tensor, an array, a picture of Pillow, or a function that returns one of these.
        source: The file it is from, or the place in it; None where there is none.
        index: Its number in the stream; None to have it counted.
    """

    stream: str
    image: Any
    source: str | None = None
    index: int | None = None


@dataclass
class Failure:
    """An error of a source, which goes on; in words."""

    stream: str
    reason: str


class Source:
    """What gives frames; iterate it once, in any thread, and close it from any other.

    ``live`` says whether frames come in their own time just now, so that a batch must not wait for
    more of them for ever.
    """

    live = False

    def __iter__(self) -> Iterator[Frame | Failure]:
        raise NotImplementedError

    def close(self) -> None:
        """Make the iteration end soon."""

    def parts(self) -> list[Source]:
        """The sources that this one consists of, each to be iterated on its own."""
        return [self]


class Several(Source):
    """Sources that are read side by side."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)

    def parts(self) -> list[Source]:
        """All of them."""
        return [part for source in self.sources for part in source.parts()]

    def close(self) -> None:
        """Close all of them."""
        for source in self.sources:
            source.close()


class IterableSource(Source):
    """Any iterable of images, or of ``(stream, image)``.

    What has a length and items is there as a whole; anything else is taken for live.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items
        self.live = not (hasattr(items, "__getitem__") and hasattr(items, "__len__"))
        self._stopped = False

    def __iter__(self) -> Iterator[Frame | Failure]:
        items, failed = iter(self.items), 0
        while failed < TRIES and not self._stopped:
            try:
                item = next(items)
            except StopIteration:
                return
            except Exception as error:  # a generator has ended with it, a loader of data may go on
                failed += 1
                yield Failure(ONLY, f"it raised {type(error).__name__}: {told(error)}")
                continue
            failed = 0
            yield _as_frame(item)

    def close(self) -> None:
        """End before the next item."""
        self._stopped = True


def _as_frame(item: Any) -> Frame:
    if isinstance(item, (Tensor, np.ndarray)) or is_picture(item):
        return Frame(ONLY, item)
    named = isinstance(item, (tuple, list)) and len(item) == 2
    if named and isinstance(item[0], (str, int)) and not isinstance(item[0], bool):
        return Frame(str(item[0]), item[1])
    return Frame(ONLY, item)


class FolderSource(Source):
    """The pictures of a folder and its subfolders, by name, as one stream.

    A folder may be written to meanwhile: a picture is taken when its file has stopped changing, and
    those that come later follow in the order of their names.

    Args:
        folder: Where they are; or one picture.
        name: Of the stream.
        follow: Seconds in which nothing new must have come until the end; infinity for no end.
        known: Pictures that come first, in this order, as paths.
    """

    def __init__(
        self, folder: Path, name: str, follow: float = 1.0, known: Sequence[str] = ()
    ) -> None:
        self.folder, self.name, self.follow = folder, name, follow
        self.known = list(known)
        self._stopped = threading.Event()

    def __iter__(self) -> Iterator[Frame | Failure]:
        given: set[str] = set(self.known)
        for path in self.known:
            yield Frame(self.name, _reader(path), path)
        seen: dict[str, tuple[Any, float]] = {}  # what a file was like, and since when
        quiet_since = time.monotonic()
        while not self._stopped.is_set():
            whole = True
            for path, about in listed(self.folder):
                if path in given:
                    continue
                now = time.monotonic()
                age = max(0.0, time.time() - about.st_mtime)
                mark = about.st_size, about.st_mtime_ns
                if seen.get(path, (None,))[0] != mark:
                    seen[path] = mark, now
                    quiet_since = now
                self.live = False
                if max(age, now - seen[path][1]) < SETTLED_S:
                    whole = False  # the next ones wait for it, so that order is that of names
                    break
                given.add(path)
                del seen[path]
                yield Frame(self.name, _reader(path), path)
                if self._stopped.is_set():
                    return
            if whole and time.monotonic() - quiet_since >= self.follow:
                return
            self.live = whole  # all that is there was given
            self._stopped.wait(POLL_S)

    def close(self) -> None:
        """End the iteration."""
        self._stopped.set()


def listed(folder: Path) -> list[tuple[str, os.stat_result]]:
    """Pictures, sorted by their paths; hidden ones are left out."""
    if not folder.is_dir():
        return [(str(folder), folder.stat())] if folder.is_file() else []
    found = []
    for here, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith((".", "__MACOSX"))]
        for name in names:
            if name.lower().endswith(PICTURES) and not name.startswith("."):
                path = os.path.join(here, name)
                try:
                    seen = os.stat(path)
                except OSError:  # gone meanwhile, or a link to nothing
                    continue
                if stat.S_ISREG(seen.st_mode):  # a pipe would be waited for
                    found.append((path, seen))
    return sorted(found)


def _reader(path: str) -> Callable[[], Any]:
    return lambda: read_picture(path)


def read_picture(file: Any, name: str = "image") -> Any:
    """Read a picture as RGB, upright.

    Args:
        file: A path, or a file object opened for bytes.
        name: The argument that an error names.

    Raises:
        ValueError: When it is no whole picture, or has more pixels than Pillow's limit.
        OSError: When the file cannot be read.
    """
    pillow = needed("PIL.Image", EXTRA)
    where = shown(str(file), 120) if isinstance(file, (str, Path)) else "what was sent"
    try:
        with pillow.open(file) as picture:
            return as_rgb(picture, name)
    except (FileNotFoundError, PermissionError, IsADirectoryError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error, IndexError
        reason = error.__cause__ or error  # of `as_rgb`, whose sentence names what is named here
        raise ValueError(
            f"`{name}` must be a whole picture, but {where} is none ({told(reason, 100)}): fetch "
            "it again or leave it out."
        ) from reason
