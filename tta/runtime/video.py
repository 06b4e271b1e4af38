"""Frames of video files, cameras and network streams, by PyAV.

Opening or reading a network stream may hang for ever, whatever timeout is set. So a live source is
read in a thread of its own, which is left behind when nothing comes from it for too long, and
another one begins anew.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tta.core.checks import shown, told
from tta.runtime.extras import needed
from tta.runtime.frames import EXTRA, Failure, Frame, Source

__all__ = ["LiveSource", "VideoFile", "camera"]

log = logging.getLogger("tta.runtime")
HELD = 4  # frames between the thread that reads and the one that takes
LEFT_BEHIND = 8  # threads that hang, until a source is given up
LONGEST_PAUSE_S = 30.0
CLOSING_S = 3.0


class VideoFile(Source):
    """The frames of a video file.

    Args:
        path: The file.
        name: Of the stream.

    Raises:
        ValueError: When it is no video.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._stopped = False
        av = needed("av", EXTRA)
        try:
            with av.open(str(path)) as container:
                picture = container.streams.video[0].codec_context
                if not picture.width:
                    raise ValueError("it has no picture")
        except (av.error.FFmpegError, IndexError, ValueError) as error:
            reason = told(error) if not isinstance(error, IndexError) else "it has no pictures"
            raise ValueError(
                f"`source` must be a folder of pictures, a picture or a video, but "
                f"{shown(str(path), 100)} is none ({reason}): choose another."
            ) from None

    def __iter__(self) -> Iterator[Frame | Failure]:
        av = needed("av", EXTRA)
        number = 0
        with av.open(str(self.path)) as container:
            for found in _decoded(container):
                if self._stopped:
                    return
                if isinstance(found, Exception):
                    yield Failure(self.name, f"a part of it cannot be decoded ({told(found)})")
                else:
                    yield Frame(self.name, found.to_image, f"{self.path}#{number}")
                    number += 1

    def close(self) -> None:
        """End before the next frame."""
        self._stopped = True


def _decoded(container: Any) -> Iterator[Any]:
    """Frames, and the errors between them."""
    av = needed("av", EXTRA)
    packets = container.demux(container.streams.video[0])
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError as error:  # the file ends within a packet
            yield error
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            yield error
            continue
        yield from frames


class LiveSource(Source):
    """A camera or a network stream, which is opened again when it breaks off.

    Args:
        address: What PyAV opens.
        name: Of the stream.
        shown_as: The address without a password, for results and messages.
        container: Its format, where the address does not say it.
        options: Of the format.
        timeout: Seconds without a frame after which it has broken off.
        tries: How often it is opened in vain before the first frame.
    """

    live = True

    def __init__(
        self,
        address: str,
        name: str,
        shown_as: str,
        *,
        container: str | None = None,
        options: Mapping[str, str] | None = None,
        timeout: float = 10.0,
        tries: int = 3,
    ) -> None:
        self.address, self.name, self.shown_as = address, name, shown_as
        self.container, self.options = container, dict(options or {})
        self.timeout, self.tries = timeout, tries
        self._stopped = threading.Event()
        needed("av", EXTRA)

    def __iter__(self) -> Iterator[Frame | Failure]:
        number = in_vain = 0
        hanging: list[_Reader] = []
        while not self._stopped.is_set():
            reader = _Reader(self)
            before = number
            try:
                for image in reader:
                    yield Frame(self.name, image.to_image, f"{self.shown_as}#{number}")
                    number += 1
            finally:
                reader.leave()
            if self._stopped.is_set():
                return
            yield Failure(self.name, f"{self.shown_as} broke off ({reader.reason})")
            hanging = [r for r in [*hanging, reader] if r.thread.is_alive()]
            in_vain = 0 if number > before else in_vain + 1
            if len(hanging) >= LEFT_BEHIND or (number == 0 and in_vain >= self.tries):
                log.error("%s is given up (%s)", self.shown_as, reader.reason)
                return
            self._stopped.wait(min(0.5 * 2.0**in_vain, LONGEST_PAUSE_S))

    def close(self) -> None:
        """End the iteration; a thread that hangs is left behind."""
        self._stopped.set()


class _Reader:
    """Reads a live source in a thread, until it breaks off or is left."""

    def __init__(self, source: LiveSource) -> None:
        self.source = source
        self.reason = "it has ended"
        self._left = threading.Event()
        self._queue: queue.Queue[Any] = queue.Queue(HELD)
        self.thread = threading.Thread(
            target=self._read, name=f"tta-reader-{source.name}", daemon=True
        )
        self.thread.start()

    def __iter__(self) -> Iterator[Any]:
        waited, step = 0.0, 0.05
        while not self.source._stopped.is_set():
            try:
                found = self._queue.get(timeout=step)
            except queue.Empty:
                waited += step
                if waited < self.source.timeout:
                    continue
                self.reason = f"nothing came for {self.source.timeout:g} s"
                return
            waited = 0.0
            if found is None:
                return
            yield found

    def leave(self) -> None:
        """Take no more frames, and wait a little for the thread to end."""
        self._left.set()
        self.thread.join(CLOSING_S if "nothing came" not in self.reason else 0.1)

    def _read(self) -> None:
        source = self.source
        av = needed("av", EXTRA)
        try:
            with av.open(
                source.address,
                format=source.container,
                options=source.options,
                timeout=(source.timeout, min(source.timeout, CLOSING_S)),
            ) as container:
                for found in _decoded(container):
                    if self._left.is_set():
                        return
                    if isinstance(found, Exception):
                        self.reason = told(found)
                    elif not self._put(found):
                        return
        except Exception as error:  # of FFmpeg, of a camera, of a device that is not there
            self.reason = told(str(error).replace(source.address, source.shown_as))
        self._put(None)

    def _put(self, found: Any) -> bool:
        while not self._left.is_set():
            try:
                self._queue.put(found, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False


def camera(number: int, name: str) -> LiveSource:
    """A camera of this machine."""
    kind = {"darwin": "avfoundation", "win32": "dshow"}.get(sys.platform, "v4l2")
    address = f"/dev/video{number}" if kind == "v4l2" else str(number)
    return LiveSource(address, name, address if kind == "v4l2" else name, container=kind)
