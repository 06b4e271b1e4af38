"""Files of JSON lines that a process that was killed goes on with, and sources that skip ahead."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tta.core.checks import parsed_json, shown, told
from tta.runtime.frames import Failure, FolderSource, Frame, Source

try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None

__all__ = ["JsonLines", "Order", "Resumed", "written"]


class JsonLines:
    """A file with an object a line, to which whole lines are added; of one process at a time.

    A line that a killed process has left unfinished is cut off.

    Args:
        path: Made if it does not exist.
        name: The argument that errors name.

    Raises:
        ValueError: When a line is no object in JSON, or another process has the file.
        OSError: When it cannot be read and written.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise type(error)(
                f"`{name}` must be a file that can be written to, but {told(path)} is not "
                f"({error.strerror}): choose another."
            ) from None
        try:
            if not stat.S_ISREG(os.fstat(self._handle).st_mode):
                raise ValueError(
                    f"`{name}` must be a file that can be read and cut too, to go on after a kill, "
                    f"but {told(path)} is a device or a pipe: choose a file."
                )
            self._lock()
            self._cut()
        except BaseException:
            os.close(self._handle)
            raise

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The objects that are in it."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    found = parsed_json(line)
                except ValueError as error:
                    found = error
                if not isinstance(found, dict):
                    raise ValueError(
                        f"`{self.name}` must be a file that this command has begun, but line "
                        f"{number} of {told(self.path)} is no object in JSON: choose another."
                    )
                yield found

    def add(self, *objects: Mapping[str, Any]) -> None:
        """Add lines, in one write.

        Raises:
            OSError: When the disk is full, ...; what was written of them is cut off again.
        """
        data = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in objects)
        left = data.encode("utf-8", "backslashreplace")
        end = os.fstat(self._handle).st_size
        try:
            while left:
                left = left[os.write(self._handle, left) :]
        except OSError as error:
            os.ftruncate(self._handle, end)
            raise type(error)(
                f"`{self.name}` must be a file that can be written to, but {told(self.path)} is "
                f"not ({error.strerror}): make room, and repeat the command to go on."
            ) from None

    def flush(self) -> None:
        """Have the disk hold the lines, which power may fail.

        Raises:
            OSError: When it cannot.
        """
        try:
            os.fsync(self._handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
                raise

    def close(self) -> None:
        """Give the file to other processes."""
        os.close(self._handle)

    @property
    def empty(self) -> bool:
        """Whether nothing is in it."""
        return os.fstat(self._handle).st_size == 0

    def clear(self) -> None:
        """Remove all lines."""
        os.ftruncate(self._handle, 0)

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"`{self.name}` must be a file of one process at a time, but another one has "
                f"{told(self.path)}: wait for it, or choose another."
            ) from None

    def _cut(self) -> None:
        """Cut off what follows the last end of a line."""
        size = end = os.fstat(self._handle).st_size
        while end:
            start = max(0, end - 65536)
            found = os.pread(self._handle, end - start, start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._handle, end)


class Order:
    """In which order files of folders were taken, which may have grown before it is read again.

    Args:
        path: Of the file where it stands.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path, "folder")
        self._lock = threading.Lock()
        self.known: dict[str, list[str]] = defaultdict(list)
        for line in self._lines:
            if isinstance(line.get("stream"), str) and isinstance(line.get("source"), str):
                self.known[line["stream"]].append(line["source"])

    def add(self, stream: str, source: str) -> None:
        """Note the next file of a stream."""
        with self._lock:
            self._lines.add({"stream": stream, "source": source})

    def flush(self) -> None:
        """As :meth:`JsonLines.flush`."""
        self._lines.flush()

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class Resumed(Source):
    """A source that goes on where a process has ended.

    Args:
        part: What is read.
        starts: By stream, how many frames are used up: those are passed over, and numbers go on
            from there; a live source has no frames of the past.
        order: Of files in folders, to be followed and gone on with.
    """

    def __init__(self, part: Source, starts: Mapping[str, int], order: Order) -> None:
        self.part, self.starts, self.order = part, starts, order
        self.replayed = not part.live
        self.known = 0
        if isinstance(part, FolderSource):
            part.known = list(order.known[part.name])
            self.known = len(part.known)

    @property
    def name(self) -> str:
        """Of the stream."""
        return getattr(self.part, "name", "source")

    @property
    def live(self) -> bool:  # type: ignore[override]
        """As the part is."""
        return self.part.live

    def __iter__(self) -> Iterator[Frame | Failure]:
        counts = {} if self.replayed else dict(self.starts)
        for item in self.part:
            if isinstance(item, Failure):
                yield item
                continue
            index = counts.get(item.stream, 0)
            counts[item.stream] = index + 1
            if isinstance(self.part, FolderSource) and index >= self.known and item.source:
                self.order.add(item.stream, item.source)
            if self.replayed and index < self.starts.get(item.stream, 0):
                continue
            yield Frame(item.stream, item.image, item.source, index)

    def close(self) -> None:
        """End the iteration."""
        self.part.close()


def written(lines: JsonLines) -> dict[str, int]:
    """By stream, the number of the frame that follows the last one in a file of predictions.

    Raises:
        ValueError: When it is no such file.
    """
    found: dict[str, int] = {}
    for line in lines:
        stream, index = line.get("stream"), line.get("index")
        if not isinstance(stream, str) or type(index) is not int or index < 0:
            raise ValueError(
                f"`{lines.name}` must be a file of predictions, but {told(lines.path)} has a line "
                f"with {shown(stream, 40)} and {shown(index, 40)}: choose another."
            )
        found[stream] = max(found.get(stream, 0), index + 1)
    return found
