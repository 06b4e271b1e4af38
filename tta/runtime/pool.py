"""Many streams on one model: each has its own state, and owners take turns.

Example::

    pool = tta.runtime.StreamPool(tta.wrap(model, "rdumb"), folder="streams")
    with pool.stream("camera-7", create=True) as camera:
        logits = camera(images)
    pool.close()  # writes the streams
    pool = tta.runtime.StreamPool.open(model, "streams")  # another process, or another machine

A stream's state is what moves, apart from the weights that all streams share. The adapter holds one
stream at a time; for another one, values are copied out and in (`tta.core.adapter_sets`), so that
any interleaving gives each stream, bit for bit, what it would have had alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tta.core.adapter import Adapter
from tta.core.adapter_sets import AdapterSets
from tta.core.checks import (
    LARGE,
    LARGEST,
    boolean,
    is_iterable,
    nearest,
    number,
    path_like,
    shown,
    string,
    told,
    whole_number,
)
from tta.core.denoiser import Diffusion
from tta.core.files import not_writable
from tta.core.head import FeatureSpec
from tta.core.outputs import LogitsSpec
from tta.core.prediction import Report
from tta.runtime.hand_over import HandOver
from tta.runtime.owners import Owners
from tta.runtime.ownership import Ownership
from tta.runtime.side_by_side import SideBySide
from tta.runtime.snapshots import Snapshots
from tta.runtime.stream_files import StreamFiles
from tta.runtime.stream_store import Stream, StreamStore, load_file
from tta.runtime.stream_view import StreamView
from tta.saving import load, save

__all__ = ["StreamPool"]

INTERVAL = 10.0  # seconds


class StreamPool:
    """Many streams on one adapter.

    While it has the adapter, the adapter itself refuses calls. All methods may be called from
    several threads. ``counts`` says how many streams were created, evicted (from memory to a file)
    and restored, and how many files were written (``snapshots``) or could not be (``failed``);
    ``failure`` is the last reason, in words. ``batched`` says whether the streams of a mixed batch
    go through the model in one pass where that is possible; set it to False for results that are
    bit for bit those of serving them one by one.

    Args:
        adapter: As it is now, it is the beginning of every new stream.
        capacity: Streams that are held in memory.
        folder: Where streams go that were used least recently, and all of them in snapshots; made
            if it does not exist. None holds all streams in memory.
        interval: Seconds. A process that is killed loses at most what its streams have learned in
            this time, as long as writing all streams that have changed takes less than half of it;
            a round that takes longer is logged. None makes no snapshots but those asked for.
        shared: Whether other processes serve streams of ``folder`` at the same time, all of them
            with ``shared``. A stream is then one process's, which hands it over when another one
            asks for it and nobody uses it, or when it ends, however it does. Needs Linux, and a
            file system with locks.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: When ``folder`` holds a pool already, which :meth:`open` goes on with, a number
            is out of its range, or ``shared`` is True without a folder.
        RuntimeError: When the adapter was unwrapped, or serves another pool.
        OSError: When ``folder`` cannot be written to, or has no locks for ``shared``.
    """

    def __init__(
        self,
        adapter: Adapter,
        capacity: int = 1000,
        folder: str | Path | None = None,
        *,
        interval: float | None = INTERVAL,
        shared: bool = False,
    ) -> None:
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"`adapter` must be a tta.Adapter, got {type(adapter).__name__}: pass what "
                "tta.wrap returned."
            )
        place = None if folder is None else path_like("folder", folder)
        capacity, interval = _checked(capacity, interval)
        if boolean("shared", shared) and place is None:
            raise ValueError("`shared` must be False where `folder` is None: pass the folder.")
        with adapter.turns.lock:
            if adapter.turns.reserved:
                raise RuntimeError(adapter.turns.reserved)
            _ = adapter.network  # refuses one that was unwrapped
            owners = Owners(place) if shared and place is not None else None
            files = None if place is None else _made(place, adapter)
            try:
                self._begin(adapter, capacity, files, interval, owners)
            except BaseException:
                adapter.turns.reserved = ""
                raise

    @classmethod
    def open(
        cls,
        model: nn.Module,
        folder: str | Path,
        *,
        capacity: int = 1000,
        interval: float | None = INTERVAL,
        shared: bool = False,
        source: Any = None,
        input: nn.Module | Diffusion | None = None,
        logits: LogitsSpec = None,
        features: FeatureSpec = None,
    ) -> StreamPool:
        """Go on with the streams in a folder, each from its last snapshot.

        Args:
            model: The classifier that was wrapped, with its source weights, on any device.
            folder: What a pool has written. Several processes may open it, as long as no two of
                them use one stream at a time; with ``shared`` they see to that.
            capacity: As for the pool.
            interval: As for the pool.
            shared: As for the pool.
            source: As for :func:`tta.load`.
            input: As for :func:`tta.load`.
            logits: As for :func:`tta.load`.
            features: As for :func:`tta.load`.

        Raises:
            TypeError: When an argument is of the wrong kind.
            FileNotFoundError: When the folder holds no pool.
            ValueError: When a file is incomplete, or of another model, method or version.
        """
        capacity, interval = _checked(capacity, interval)
        adapter = load(model, folder, source=source, input=input, logits=logits, features=features)
        try:
            files = StreamFiles(path_like("folder", folder), adapter.fingerprint)
            if not files.start.is_file():
                raise FileNotFoundError(
                    f"`folder` must hold a pool, but {told(files.start)} is missing: pass the "
                    "folder of a StreamPool, or load the adapter by tta.load."
                )
            load_file(files.start, AdapterSets(adapter), *files.read(files.start, ""))
            pool = cls.__new__(cls)
            with adapter.turns.lock:
                owners = Owners(files.folder) if boolean("shared", shared) else None
                pool._begin(adapter, capacity, files, interval, owners)
        except BaseException:
            adapter.turns.reserved = ""
            adapter.unwrap()
            raise
        return pool

    def _begin(
        self,
        adapter: Adapter,
        capacity: int,
        files: StreamFiles | None,
        interval: float | None,
        owners: Owners | None,
    ) -> None:
        self.adapter = adapter
        self.batched, self.shared = True, owners is not None
        self._store = StreamStore(adapter, capacity, files, owners)
        self._ownership = Ownership(self._store)
        self._beside = SideBySide(self._store)
        self._snapshots = None
        self._hand_over = None if owners is None else HandOver(self._store, owners)
        if files is not None and interval is not None:
            self._snapshots = Snapshots(self._store, interval)

    def stream(self, name: str, create: bool = False, wait: bool = True) -> StreamView:
        """A stream, owned within a ``with`` block, or by each call outside of one.

        Args:
            name: Of the stream; any string.
            create: Whether a stream that is not there begins as the adapter was when the pool was
                made, with the same seed.
            wait: Whether to wait for another owner; False refuses at once.

        Returns:
            What is called and read like an adapter.

        Raises:
            TypeError: When ``name`` is no string.
            KeyError: When there is no such stream, and ``create`` is False.
            ValueError: When its file is damaged.
            RuntimeError: When the stream has another owner and ``wait`` is False, this thread owns
                it already, there are ``capacity`` streams and no ``folder``, or the pool is closed.
        """
        stream = self._known(name, boolean("create", create), boolean("wait", wait))
        view = StreamView(
            name,
            lambda action, changes: self._store.run(stream, action, changes),
            lambda view: self._ownership.begin(stream, view, wait),
            lambda view: self._ownership.end(stream, view),
        )
        if not wait:  # refused at once
            self._ownership.begin(stream, view, wait)
            self._ownership.end(stream, view)
        return view

    def __call__(self, images: Tensor, streams: Sequence[str], create: bool = False) -> Tensor:
        """Predict a batch whose rows belong to several streams.

        The rows of one stream are one batch of it, in their order. Results are those of serving the
        streams one by one, up to rounding; see ``batched`` and :attr:`one_by_one`. When a call
        raises, no stream has changed and none was created.

        Args:
            images: (B, ...), as the model takes them.
            streams: The stream of each row, B names.
            create: As for :meth:`stream`.

        Returns:
            Logits (B, C), in the order of the rows.

        Raises:
            TypeError: When ``images`` is no tensor, or a name no string.
            ValueError: When there are not as many names as rows.
            KeyError: When a stream is not there, and ``create`` is False.
            RuntimeError: As for :meth:`stream`.
        """
        self._store.check_open()
        network = self.adapter.network
        network.check(images)
        if not is_iterable(streams):
            raise TypeError(
                f"`streams` must be a list with a name for each of {len(images)} images, got "
                f"{shown(streams)}: pass a list."
            )
        names = [string("streams", name) for name in streams]
        if isinstance(streams, str) or len(names) != len(images):
            raise ValueError(
                f"`streams` must name one stream for each of {len(images)} images, got "
                f"{len(names)} names: pass a list."
            )
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        found = self.run_each(
            rows, lambda a, name: a(images if len(rows) == 1 else images[rows[name]]), create
        )
        read = network.reader.read
        parts = [answer if isinstance(answer, Tensor) else read(answer) for answer in found]
        logits = parts[0].new_empty((len(images), *parts[0].shape[1:]))
        for mine, part in zip(rows.values(), parts, strict=True):
            logits[mine] = part
        return logits

    def run_each(
        self,
        streams: Mapping[str, Any],
        action: Callable[[Adapter, str], Any],
        create: bool = False,
        wait: bool = True,
    ) -> list[Any]:
        """What a function of adapter and name does to each stream, for tta.runtime.

        For all of them, or for none where it raises, and none was created then; in one pass as a
        mixed batch is. Meanwhile the caller owns them.

        Args:
            streams: Names of streams.
            action: What to do; it must not keep the adapter.
            create: As for :meth:`stream`.
            wait: As for :meth:`stream`.
        """
        new = [name for name in streams if self._store.find(name) is None]
        if new and not boolean("create", create):
            self._known(new[0])
        views: list[StreamView] = []
        unused: list[Stream] = []  # until now, and made for this call
        # No ExitStack: a signal that comes while it ends leaves it in a cycle of references, and
        # the streams with it.
        try:
            for name in sorted(streams):  # in one order, or two calls would wait for each other
                views.append(self.stream(name, create, wait))
                views[-1].__enter__()
                stream = self._store.streams[name]
                unused += [stream] if name in new and stream.version == 0 else []
            serve = self._beside if self.batched else self._store
            found = serve.run_each(streams, action)
            unused = []
            for view in views:
                view.__exit__()
            return found
        except BaseException:
            try:
                for stream in unused:
                    self._store.drop(stream)
            finally:
                for view in views:
                    view.__exit__()
            raise

    @property
    def one_by_one(self) -> str | None:
        """Why the streams of a mixed batch are served one after the other, in words.

        None where they go through the model together. What only shows when images are there, such
        as a model that does not keep their rows apart, is known after the first mixed batch.
        """
        if not self.batched:
            return "`batched` is False"
        return self._beside.find_out()

    def streams(self) -> list[str]:
        """The names of all streams, in memory and in the folder."""
        return self._store.names()

    def reset(self, name: str) -> None:
        """Put a stream back to its beginning, between two calls if it has an owner."""
        self._store.run(self._known(name), lambda adapter: adapter.reset())

    def freeze(self, name: str) -> None:
        """Stop all learning of a stream; predictions go on."""
        self._store.run(self._known(name), lambda adapter: adapter.freeze())

    def unfreeze(self, name: str) -> None:
        """Resume the learning of a stream."""
        self._store.run(self._known(name), lambda adapter: adapter.unfreeze())

    def health(self, name: str) -> Report:
        """As ``Adapter.health``, of one stream."""
        return self._store.run(self._known(name), lambda adapter: adapter.health, changes=False)

    def drop(self, name: str) -> None:
        """Forget a stream, and remove its file.

        Raises:
            KeyError: When there is no such stream.
            RuntimeError: When the stream has an owner.
        """
        stream = self._known(name)
        with self.stream(name, wait=False):
            self._store.drop(stream)

    def snapshot(self, name: str | None = None) -> int:
        """Write all streams that have changed since they were last written, or one of them.

        Args:
            name: Of the one; None for all.

        Returns:
            How many were written.

        Raises:
            KeyError: When there is no such stream.
            RuntimeError: When the pool has no folder, or is closed.
            OSError: When a stream could not be written; the others were.
        """
        store = self._store
        store.check_open()
        only = None if name is None else [self._known(name)]
        if store.files is None:
            raise RuntimeError(
                "`folder` must be there for a snapshot, got None: make the pool with a folder."
            )
        before, written = store.counts["failed"], store.write_changed(only=only)
        if store.counts["failed"] > before:
            raise OSError(
                f"`folder` must be one that can be written to, but {told(store.failure, 160)}: "
                "make room, and call again; the streams go on."
            )
        return written

    def close(self, save: bool = True) -> None:
        """Write the streams, where there is a folder, and give the adapter back as it was.

        Args:
            save: Whether streams are written; False loses what has changed since the last snapshot.

        Raises:
            OSError: When a stream could not be written; the pool then is still open.
        """
        store, save = self._store, boolean("save", save)
        if not store.closed:
            if save and store.files is not None:
                self.snapshot()
            if self._hand_over is not None:
                self._hand_over.stop()
            store.close()
        self._beside.close()
        if self._snapshots is not None:
            self._snapshots.stop()
        self._ownership.tell()

    def owned(self, name: str) -> bool:
        """Whether a stream has an owner at this moment."""
        return self._known(name).owner is not None

    @property
    def capacity(self) -> int:
        """Streams that are held in memory."""
        return self._store.capacity

    @property
    def folder(self) -> Path | None:
        """Where streams are written."""
        return None if self._store.files is None else self._store.files.folder

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has ended it."""
        return self._store.closed

    @property
    def counts(self) -> dict[str, int]:
        """What has happened so far, see above."""
        return dict(self._store.counts)

    @property
    def failure(self) -> str | None:
        """Why a file could not be written, the last time; None if that never happened."""
        return self._store.failure

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._store.find(name) is not None

    def __enter__(self) -> StreamPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        store = self._store
        where = "no folder" if store.files is None else str(store.files.folder)
        closed = ", closed" if store.closed else ""
        return (
            f"StreamPool({len(store.streams)} streams, {len(store.in_memory)} in memory, "
            f"{where}{closed})"
        )

    def _known(self, name: str, create: bool = False, wait: bool = False) -> Stream:
        """A stream, which is made if it is not there and may be."""
        store = self._store
        store.check_open()
        stream = store.find(string("stream", name))
        if stream is not None or create:
            return stream or store.make(name, wait)
        raise KeyError(
            f"`stream` must be one of the pool's, got {shown(name, 60)}: begin it by "
            f"stream(..., create=True). {nearest(name, store.streams, room=60)}"
        )


def _checked(capacity: Any, interval: Any) -> tuple[int, float | None]:
    if interval is not None:
        interval = number("interval", interval, 0, LARGE, above=True)
    return whole_number("capacity", capacity, 1, LARGEST), interval


def _made(folder: Path, adapter: Adapter) -> StreamFiles:
    """Write what every stream begins with into a folder that holds no pool."""
    if (folder / "config.json").exists():
        raise ValueError(
            f"`folder` must hold no adapter or pool yet, but {told(folder)} does: go on with it by "
            "StreamPool.open(model, folder), or choose another."
        )
    files = StreamFiles(folder, adapter.fingerprint)
    try:
        files.write(files.start, "", AdapterSets(adapter).export_first())
    except OSError as error:
        raise not_writable("folder", folder, error) from error
    save(adapter, folder)
    return files
