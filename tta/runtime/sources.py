"""``open_source``: folders, videos, cameras and network streams by what they are called."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from tta.core.checks import number, path_like, shown, whole_number
from tta.runtime.frames import PICTURES, FolderSource, Several, Source
from tta.runtime.video import LiveSource, VideoFile, camera

__all__ = ["open_source"]

NETWORK = ("rtsp", "rtsps", "rtp", "rtmp", "srt", "udp", "tcp", "http", "https")
MOST_CAMERAS = 1023
LONGEST_NUMBER = 9  # digits
FOLLOW = 1.0
TIMEOUT = 10.0
# Of RTSP: frames that are lost on the way would grey the picture.
RTSP_OPTIONS = {"rtsp_transport": "tcp"}


def open_source(spec: Any, *, follow: float = FOLLOW, timeout: float = TIMEOUT) -> Source:
    """Open what a pipeline takes frames from.

    Args:
        spec: A folder of pictures, which may be written to meanwhile; a picture; a video file; the
            number of a camera; an address such as ``rtsp://host/path``; or a list of these, whose
            streams are called by folder, file, camera and address, or a dict with names of yours.
        follow: Seconds in which nothing new must have come into a folder, while it is read, until
            it counts as complete; infinity waits for ever.
        timeout: Seconds without a frame after which a camera or an address is opened again.

    Returns:
        The source, for :class:`tta.runtime.Pipeline`; nothing is read yet.

    Raises:
        TypeError: When ``spec`` is none of these.
        FileNotFoundError: When there is no such file or folder.
        ValueError: When a file is no video, or an address is of an unknown kind.
        ImportError: When PyAV or Pillow is needed and not installed.
    """
    wait = float("inf") if follow == float("inf") else number("follow", follow, 0)
    patience = number("timeout", timeout, 0, above=True)
    taken: set[str] = set()
    found = [_opened(one, _free(name, taken), wait, patience) for name, one in _each(spec, None)]
    if not found:
        raise ValueError("`source` must be at least one source, got an empty list: name one.")
    return found[0] if len(found) == 1 else Several(found)


def _each(spec: Any, name: str | None) -> Iterator[tuple[str, Any]]:
    """Each single source with the name of its stream."""
    if isinstance(spec, Mapping):
        for key, one in spec.items():
            yield from _each(one, str(key))
    elif isinstance(spec, Sequence) and not isinstance(spec, (str, bytes)):
        for one in spec:
            yield from _each(one, name)
    else:
        yield name or _name_of(spec), spec


def _name_of(spec: Any) -> str:
    if _is_camera(spec):
        return f"camera-{spec}"
    if isinstance(spec, str) and "://" in spec:
        return _safe(spec).partition("://")[2]
    if isinstance(spec, (str, PathLike)):
        path = Path(spec).absolute()
        return path.name if os.path.isdir(path) else path.stem  # pathlib's raises for long ones
    return "source"


def _is_camera(spec: Any) -> TypeGuard[int | str]:
    """Whether a source is the number of a camera; what has more digits is the name of a file."""
    digits = isinstance(spec, str) and spec.isdecimal() and len(spec) <= LONGEST_NUMBER
    return isinstance(spec, int) or digits


def _free(name: str, taken: set[str]) -> str:
    """The name, or one that is still free."""
    found, count = name, 2
    while found in taken:
        found, count = f"{name}-{count}", count + 1
    taken.add(found)
    return found


def _safe(address: str) -> str:
    """An address without user, password and what may hold a token.

    Raises:
        ValueError: When it cannot be one.
    """
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError:  # whose words may hold the password
        scheme, _, place = address.partition("://")
        place = re.split(r"[?#]", place.rpartition("@")[2])[0]
        raise ValueError(
            "`source` must be an address such as rtsp://host:554/path, got "
            f"{shown(f'{scheme}://{place}')}, of which host and port cannot be read: correct it."
        ) from None
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _opened(spec: Any, name: str, follow: float, timeout: float) -> Source:
    if isinstance(spec, Source):
        return spec
    if isinstance(spec, bool) or not isinstance(spec, (int, str, PathLike)):
        raise TypeError(
            f"`source` must be a folder, a file, the number of a camera or an address, got "
            f"{shown(spec)}: pass a string, or an iterable of images to the pipeline itself."
        )
    if _is_camera(spec):
        return camera(whole_number("source", int(spec), 0, MOST_CAMERAS), name)
    if isinstance(spec, str) and "://" in spec:
        return _network(spec, name, timeout)
    path = path_like("source", spec)
    if not path.exists():
        raise _missing(path)
    if path.is_dir() or path.suffix.lower() in PICTURES:
        return FolderSource(path, name, follow if path.is_dir() else 0.0)
    if not path.is_file():
        raise ValueError(
            f"`source` must be a folder or a file, got {shown(str(path))}, which is neither: name "
            "a camera by its number."
        )
    return VideoFile(path, name)


def _network(address: str, name: str, timeout: float) -> LiveSource:
    scheme = address.partition("://")[0].lower()
    if scheme not in NETWORK:
        raise ValueError(
            f"`source` must be an address of {', '.join(NETWORK)}, got {shown(_safe(address))}: "
            "pass a path for a file."
        )
    if not urlsplit(address).netloc:
        raise ValueError(
            f"`source` must be an address such as {scheme}://host/path, got "
            f"{shown(_safe(address))}: name a host."
        )
    options = RTSP_OPTIONS if scheme.startswith("rtsp") else {}
    return LiveSource(address, name, _safe(address), options=options, timeout=timeout)


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"`source` must be there, but {shown(str(path), 120)} is not: check the path."
    )
