"""Where the streams of a pool are: one in the adapter, others in memory, the rest in files."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tta.core.adapter import Adapter
from tta.core.adapter_sets import AdapterSet, AdapterSets
from tta.core.checks import shown, told
from tta.core.turns import guest
from tta.runtime.owners import POLL, ElsewhereError, Owners
from tta.runtime.stream_files import StreamFiles

__all__ = ["Before", "Seat", "Stream", "StreamStore", "load_file"]

log = logging.getLogger("tta.runtime")
Result = TypeVar("Result")
RESERVED = (
    "`adapter` must not be used while a StreamPool has it, whose streams it holds one after the "
    "other: use pool.stream(name), or close() the pool first."
)
INSIDE = (
    "`pool` must not be used by a function that the adapter calls within a call, got such a use: "
    "keep what it is given, and use the pool afterwards."
)


class Stream:
    """What is known of one stream. It is in a seat, in ``kept``, or in its file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept: AdapterSet | None = None
        self.version = 0  # calls that may have changed it
        self.saved = -1  # the version in its file; -1 for none
        self.owner: tuple[int, int] | None = None  # its view and thread, by id
        self.seat: Seat | None = None


class Seat:
    """An adapter, or a twin of it, that holds one stream at a time.

    Args:
        sets: Of that adapter.
    """

    def __init__(self, sets: AdapterSets) -> None:
        self.adapter, self.sets = sets.adapter, sets
        self.stream: Stream | None = None  # the last one; there as long as it says so too

    def set_aside(self) -> None:
        """Take the stream out that is there; another one must be put in next."""
        stream = self.stream
        if stream is not None and stream.seat is self:
            stream.kept = self.sets.take()
            stream.seat = None
        self.stream = None


Before = list[tuple[Stream, AdapterSet]]


class StreamStore:
    """Brings streams into the adapter and out of it.

    Args:
        adapter: As it is now, it is the beginning of every new stream; nobody else may use it until
            :meth:`close`.
        capacity: Streams that are held in memory.
        files: Where the others are; None for nowhere.
        owners: Of the streams, where other processes serve the same files at the same time. A
            stream that this process does not own is in no seat and not in memory.
    """

    def __init__(
        self,
        adapter: Adapter,
        capacity: int,
        files: StreamFiles | None,
        owners: Owners | None = None,
    ) -> None:
        self.adapter, self.capacity, self.files = adapter, capacity, files
        self.owners = owners
        self.sets = AdapterSets(adapter)
        self.counts = {"created": 0, "evicted": 0, "restored": 0, "snapshots": 0, "failed": 0}
        if owners is not None:
            self.counts["handed_over"] = 0
        self.failure: str | None = None  # what went wrong last with a file, in words
        self.streams: dict[str, Stream] = {}
        self.in_memory: OrderedDict[str, Stream] = OrderedDict()  # the least recently used first
        self.closed = False
        self.seat = Seat(self.sets)  # of the adapter itself
        self._disk = threading.RLock()  # taken after the turn, never before it
        adapter.turns.reserved = RESERVED
        self._look_at_files()

    def close(self) -> None:
        """Give the adapter back as it was."""
        with self.turn():
            self.seat.set_aside()
            self.sets.put_first()
            if self.owners is not None:
                self.owners.close()
            self.adapter.turns.reserved = ""
            self.closed = True  # last, so that it can be done again after a signal

    def check_open(self) -> None:
        """Refuse to go on after :meth:`close`."""
        if self.closed:
            raise RuntimeError("this pool was closed: make or open another.")

    def turn(self) -> AbstractContextManager[Any]:
        """What has the model alone in a ``with`` block."""
        turns = self.adapter.turns
        if getattr(guest, "of", None) is turns or turns.admitted == threading.get_ident():
            raise RuntimeError(INSIDE)
        return turns.lock

    def check_there(self, stream: Stream) -> None:
        """Refuse a stream that was dropped; another one may have its name by now.

        Raises:
            KeyError: When it was.
        """
        if self.streams.get(stream.name) is not stream:
            raise _dropped(stream.name)

    def find(self, name: str) -> Stream | None:
        """A stream that is known, or has a file that another process has written."""
        stream = self.streams.get(name)
        if self.files is None or (stream is not None and self._is_mine(stream)):
            return stream
        there = self.files.place(name).is_file()
        if there == (stream is not None):
            return stream
        with self.turn():
            if not there:
                self._forget(name)
            elif name not in self.streams:
                self._note_file(name)
            return self.streams.get(name)

    def names(self) -> list[str]:
        """All streams: in memory, and in files, where these are shared those of others too."""
        if self.owners is not None:
            self._look_at_files()
        return list(self.streams)

    def claim(self, stream: Stream, wait: bool) -> None:
        """Own a stream among processes; ask the one that does for it, and wait if that is wanted.

        Raises:
            ElsewhereError: When another process has it.
        """
        while self.owners is not None:
            with self.turn():  # so that it is not handed over at the same time
                self.check_open()
                if self.owners.claim(stream.name):
                    return
            _rest(stream.name, wait)

    def hand_over(self, name: str) -> None:
        """Let another process own a stream, unless it is in use here or cannot be written."""
        assert self.owners is not None
        with self.turn(), self._disk:
            stream = self.streams.get(name)
            if self.closed or (stream is not None and stream.owner is not None):
                return
            if name in self.in_memory and not self._put_away(self.in_memory[name]):
                return
            self.owners.give(name)
            self.counts["handed_over"] += 1
            log.info("stream %s: another process has it from now on", shown(name, 60))

    def make(self, name: str, wait: bool = False) -> Stream:
        """A stream at its beginning, or the one of this name that is there.

        Raises:
            ElsewhereError: When another process is making it, unless that is waited for.
        """
        while (stream := self.find(name) or self._make(name)) is None:
            _rest(name, wait)
        return stream

    def _make(self, name: str) -> Stream | None:
        """As :meth:`make`; None where another process has the name."""
        with self.turn():
            self.check_open()
            if name in self.streams:  # somebody else was faster
                return self.streams[name]
            if self.owners is not None:
                assert self.files is not None
                if not self.owners.claim(name):
                    return None
                if self.files.place(name).is_file():  # another process was, and is done with it
                    return self._note_file(name)
            if self.files is None and len(self.in_memory) >= self.capacity:
                raise RuntimeError(
                    f"`capacity` must be at least the number of streams where `folder` is None, "
                    f"got {self.capacity} and a new stream: pass a larger capacity, or a folder "
                    "for the streams that were used least recently."
                )
            stream = Stream(name)
            stream.kept = self.sets.new()
            self.streams[name] = self.in_memory[name] = stream
            self.counts["created"] += 1
            if self.owners is not None:  # others are to know of it, and to find it if this one dies
                self._write(stream, stream.kept, stream.version)
            self._make_room(stream)
            return stream

    def drop(self, stream: Stream) -> None:
        """Forget a stream, and remove its file."""
        with self.turn(), self._disk:
            if self.streams.get(stream.name) is stream:
                if self.owners is not None and not self.owners.claim(stream.name):
                    raise ElsewhereError(stream.name)
                if self.files is not None:
                    self.files.remove(self.files.place(stream.name))
                del self.streams[stream.name]
                self.in_memory.pop(stream.name, None)
                if self.owners is not None:
                    self.owners.give(stream.name)
            stream.seat = None

    def run(
        self, stream: Stream, action: Callable[[Adapter], Result], changes: bool = True
    ) -> Result:
        """Return what a function of the adapter does while that holds a stream.

        Args:
            stream: To be brought into the adapter.
            action: What to do.
            changes: Whether it may change the stream.
        """
        with self.turn():
            self.bring(stream)
            return self.call([stream] if changes else [], lambda: action(self.adapter))

    def run_each(
        self, streams: Mapping[str, Any], action: Callable[[Adapter, str], Any]
    ) -> list[Any]:
        """Do as :meth:`run` for several streams in one turn; for all of them, or for none.

        Args:
            streams: Their names.
            action: Also takes the name.
        """
        names = list(streams)

        def each(before: Before) -> list[Any]:
            found = []
            for name in names:
                stream = self.streams[name]
                self.bring(stream)
                if name != names[-1]:  # of the last one, a call takes itself back
                    before.append((stream, self.sets.take().copy()))
                found.append(self.call([stream], lambda name=name: action(self.adapter, name)))
            return found

        with self.turn():
            return self.all_or_none(each)

    # No context managers by generators here: one that an interruption leaves would end its block
    # when it is collected, in the middle of something else.

    def all_or_none(self, action: Callable[[Before], Result]) -> Result:
        """Return what a function does; where it raises, put streams back to the sets in its list.

        The caller has the turn.
        """
        before: Before = []
        try:
            return action(before)
        except BaseException:
            for stream, one in before:
                stream.kept = one
                stream.seat = None
                self.in_memory[stream.name] = stream
            raise

    def call(self, changed: Sequence[Stream], action: Callable[[], Result]) -> Result:
        """Return what a function does that may call the adapter, and change these streams."""
        turns = self.adapter.turns
        for stream in changed:  # before, as an exception may come at any line
            stream.version += 1
        turns.admitted = threading.get_ident()
        try:
            return action()
        finally:
            turns.admitted = None

    def write_changed(
        self, stopped: threading.Event | None = None, only: Sequence[Stream] | None = None
    ) -> int:
        """Write all streams that have changed, unless stopped; return how many were written.

        With ``only``, those of them alone.

        Streams go on meanwhile; only the copies are taken in turn. Failures are logged and counted.
        """
        written = 0
        for stream in list(self.streams.values()) if only is None else only:
            if stopped is not None and stopped.is_set():
                break
            if stream.saved == stream.version or self.files is None:
                continue
            with self.turn():
                one, version = stream.kept, stream.version
                if stream.seat is not None:
                    one = stream.seat.sets.take()
                one = None if one is None or self.closed else one.copy()
            written += one is not None and self._write(stream, one, version)
        return written

    def _write(self, stream: Stream, one: AdapterSet, version: int) -> bool:
        assert self.files is not None
        with self._disk:
            # It may have been dropped, or a later version written by somebody else.
            if self.streams.get(stream.name) is not stream or version <= stream.saved:
                return False
            path = self.files.place(stream.name)
            try:
                self.files.write(path, stream.name, self.sets.export(one))
            except (OSError, TypeError) as error:
                reason = (error.strerror or error) if isinstance(error, OSError) else error
                self.failure = f"{path.name} could not be written ({told(reason)})"
                self.counts["failed"] += 1
                log.warning("stream %s: %s; it goes on in memory", shown(stream.name), self.failure)
                return False
            stream.saved = version
            self.counts["snapshots"] += 1
            return True

    def _look_at_files(self) -> None:
        """Know the streams that have files, and forget those of others whose files are gone."""
        if self.files is None:
            return
        known = {self.files.place(name): name for name in list(self.streams)}
        found = set(self.files.paths())
        new = sorted(self.files.names(found - known.keys()))
        gone = [known[path] for path in known.keys() - found]
        if not new and not gone:
            return  # without a turn, which would wait for the model
        with self.turn():
            for name in new:
                if name not in self.streams:
                    self._note_file(name)
            for name in gone:
                self._forget(name)

    def _is_mine(self, stream: Stream) -> bool:
        return self.owners is None or stream.name in self.owners

    def _forget(self, name: str) -> None:
        """Forget a stream that another process has dropped."""
        if name in self.streams and not self._is_mine(self.streams[name]):
            del self.streams[name]

    def _note_file(self, name: str) -> Stream:
        stream = self.streams[name] = Stream(name)
        stream.saved = stream.version = 1  # 0 is a new one, which may be dropped again
        return stream

    def bring(self, stream: Stream, seat: Seat | None = None) -> None:
        """Let the adapter hold a stream, or the one of another seat; the caller has the turn."""
        seat = seat or self.seat
        self.check_open()
        name = stream.name
        self.check_there(stream)
        if self.owners is not None:
            if not self.owners.claim(name):
                raise ElsewhereError(name)
            if self._is_gone(stream):  # another process has dropped it while this one waited
                self.owners.give(name)
                del self.streams[name]
                raise _dropped(name)
        if stream.seat is not seat:
            if stream.seat is not None:
                stream.seat.set_aside()
            if stream.kept is None:
                path, tensors, about = self._read(name)
                self.seat.set_aside()
                load_file(path, self.sets, tensors, about)
                self.counts["restored"] += 1
                stream.kept = self.sets.take() if seat is not self.seat else None
            if stream.kept is not None:
                seat.set_aside()
                seat.sets.put(stream.kept)
            seat.stream = stream
            stream.seat, stream.kept = seat, None
        self.in_memory[name] = stream
        self.in_memory.move_to_end(name)
        self._make_room(stream)

    def touch(self, streams: Sequence[Stream]) -> None:
        """Count streams as the last that were used, those of them that are in memory."""
        for stream in streams:
            if stream.name in self.in_memory:
                self.in_memory.move_to_end(stream.name)

    def _is_gone(self, stream: Stream) -> bool:
        """Whether a stream is in no memory and has no file."""
        if stream.name in self.in_memory or self.files is None:
            return False
        return not self.files.place(stream.name).is_file()

    def _read(self, name: str) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
        assert self.files is not None
        path = self.files.place(name)
        return path, *self.files.read(path, name)

    def _make_room(self, stream: Stream) -> None:
        """Write the least recently used streams, but this one, until there are few enough."""
        while len(self.in_memory) > self.capacity:
            oldest = next(other for other in self.in_memory.values() if other is not stream)
            if not self._put_away(oldest):
                return  # it is tried again at the next turn
            self.counts["evicted"] += 1

    def _put_away(self, stream: Stream) -> bool:
        """Leave a stream in its file alone; False where it could not be written."""
        if stream.seat is not None:
            stream.seat.set_aside()
        assert stream.kept is not None
        if stream.saved != stream.version:
            self._write(stream, stream.kept, stream.version)
        if stream.saved != stream.version:
            return False
        stream.kept = None
        del self.in_memory[stream.name]
        return True


def _dropped(name: str) -> KeyError:
    return KeyError(
        f"`stream` must be one of the pool's, but {shown(name, 60)} was dropped: ask the pool for "
        "it again, with create=True."
    )


def _rest(name: str, wait: bool) -> None:
    """Give another process time to hand a stream over, or refuse to wait for it."""
    if not wait:
        raise ElsewhereError(name)
    time.sleep(POLL)


def load_file(
    path: Path, sets: AdapterSets, tensors: dict[str, Tensor], about: dict[str, Any]
) -> None:
    """Put what a file holds into the adapter, or say which file does not fit."""
    try:
        sets.load(tensors, about)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`folder` must hold streams of this pool's adapter, but {path.name} does not fit it "
            f"({told(error, 120)}): drop() the stream, or put a good file there."
        ) from error
