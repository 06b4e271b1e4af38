"""What a server does with a pool of streams, whatever protocol asks for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta.core.adapter import Adapter
from tta.core.checks import nearest, number, shown, told, whole_number
from tta.runtime.owners import ElsewhereError
from tta.runtime.pool import StreamPool
from tta.runtime.server.batching import Batcher, Item
from tta.runtime.server.events import Events
from tta.runtime.server.gate import Load
from tta.runtime.server.limits import STOPPING, Limits, RefusedError
from tta.runtime.server.metrics import Metrics
from tta.runtime.server.watch import StreamWatch, plain, words_of
from tta.runtime.steps import Step, step, taken

__all__ = ["Service"]

log = logging.getLogger("tta.runtime.server")
LONGEST_NAME = 200  # characters of a stream's name
NOT_OF_AN_IMAGE = (RefusedError, KeyError, MemoryError, ElsewhereError)  # but of its whole batch


class Service:
    """Serves the streams of a pool. Blocks; safe to call from several threads.

    Args:
        pool: Of the streams.
        class_names: In the order of labels; None calls them by their numbers.
        limits: What is refused.
        batch_size: Images of one stream in a batch, at most.
        max_wait: Seconds that an image waits for others.
        thumbnails: Kept of each stream; 0 for none.
    """

    def __init__(
        self,
        pool: StreamPool,
        class_names: Sequence[str] | None,
        limits: Limits,
        batch_size: int,
        max_wait: float,
        thumbnails: int,
    ) -> None:
        classes = pool.adapter.num_classes
        if class_names is not None and len(class_names) != classes:
            raise ValueError(
                f"`class_names` must be {classes}, as the model has classes, got "
                f"{len(class_names)}: pass the names of this model, or None."
            )
        self.pool, self.limits = pool, limits
        self.class_names = list(map(str, class_names or range(classes)))
        self.events = Events(limits.listeners)
        self.load = Load()
        self.stopping = False
        self._thumbnails = whole_number("thumbnails", thumbnails, 0, 100)
        self._failure: OSError | None = None  # of writing the streams in the end
        self._watches: dict[str, StreamWatch] = {}
        self._closing = threading.Lock()
        self._begun: set[str] = set()  # streams that this round has made
        rows = whole_number("batch_size", batch_size, 1, 4096)
        wait = number("max_wait", max_wait, 0, 60)
        gauges = {
            ("tta_streams", "Streams that are known."): lambda: len(pool.streams()),
            ("tta_waiting_images", "Images that wait for the model."): lambda: batcher.waiting,
            ("tta_held_bytes", "Bytes of requests that are being served."): lambda: self.load.size,
            ("tta_listeners", "Clients that follow events."): lambda: self.events.listening,
        }
        self.metrics = Metrics(lambda: list(self._watches.values()), lambda: pool.counts, gauges)
        self._batcher = batcher = Batcher(self._serve, rows, wait, limits.queue)

    @property
    def ready(self) -> bool:
        """Whether images are taken."""
        return self._batcher.alive and not self.stopping and not self.pool.closed

    @property
    def alive(self) -> bool:
        """Whether the thread that has the model is there."""
        return self._batcher.alive

    def check_stream(self, name: str, create: bool = False) -> None:
        """Refuse a stream that is not there, or a name that none may have.

        Raises:
            RefusedError: 404, or 422.
        """
        ordinary = 0 < len(name) <= LONGEST_NAME and name.isprintable()
        # Other bytes than UTF-8 all become one character, and clients take dots out of a path.
        if not ordinary or "/" in name or "\ufffd" in name or name in (".", ".."):
            raise RefusedError(
                422,
                f"`stream` must be a name of 1 to {LONGEST_NAME} printable characters in UTF-8, "
                f"without a slash and other than . and .., got {shown(name, 60)}: give it another.",
            )
        if not create and name not in self.pool:
            raise RefusedError(
                404,
                f"`stream` must be there, got {shown(name, 60)}: create it by POST /v1/streams/ID, "
                f"or add create=true. {nearest(name, self.pool.streams()[:1000], room=60)}",
            )

    def check_room(self, names: Iterable[str]) -> None:
        """Refuse streams that are to be created, all of them, where some would be too many.

        Raises:
            RefusedError: 429.
        """
        new = {name for name in names if name not in self.pool}
        most = self.limits.streams
        if self.pool.folder is None:
            most = min(most, self.pool.capacity)
        if new and len(self.pool.streams()) + len(new) > most:
            count = "a new one" if len(new) == 1 else f"{len(new)} new ones"
            raise RefusedError(
                429,
                f"`stream` must be one of at most {most}, got {count}: delete one that is not "
                "needed, by DELETE /v1/streams/ID.",
            )

    def wants_thumbnail(self, name: str) -> bool:
        """Whether a stream's last thumbnail is old enough for another."""
        watch = self._watches.get(name)
        return self._thumbnails > 0 if watch is None else watch.wants_thumbnail()

    def submit(self, items: Sequence[Item]) -> None:
        """Let images wait for their predictions, side by side.

        Raises:
            RefusedError: 429 when too many wait, 503 after :meth:`close`.
        """
        self._batcher.submit(items)

    def create(self, name: str) -> bool:
        """Make a stream, if it is not there; return whether it was made."""
        self.check_stream(name, create=True)
        return self._in_turn(lambda: self._make(name))

    def drop(self, name: str) -> None:
        """Forget a stream and remove its file."""

        def act() -> None:
            self.pool.drop(name)
            self._watches.pop(name, None)

        self._in_turn(act, name)
        self._tell("dropped", name)

    def control(self, name: str, action: str) -> dict[str, Any]:
        """Freeze, unfreeze, reset or save a stream, and return its summary."""
        if action == "save":
            return self._save(name)

        def act() -> None:
            with self.pool.stream(name, wait=False) as view:
                _bring(view)
                getattr(view, action)()
                self._watch(name).frozen = not view.session.learning

        self._in_turn(act, name)
        self._tell(action, name)
        return self._watch(name).summary()

    def health(self, name: str) -> dict[str, Any]:
        """What is known of a stream, with its health as it is in the pool."""

        def look() -> tuple[Any, Any, bool]:
            with self.pool.stream(name, wait=False) as view:
                learning = _bring(view)
                return view.health, view.events, learning

        health, events, learning = self._in_turn(look, name)
        watch = self._watch(name)
        watch.frozen = not learning
        told = {"health": plain(health), "events": plain(events[-100:])}
        return watch.summary() | told

    def list(self) -> list[dict[str, Any]]:
        """A summary of each stream."""
        blank = StreamWatch("", 0).summary()
        watches = dict(self._watches)
        return [
            watches[name].summary() if name in watches else blank | {"stream": name}
            for name in self.pool.streams()
        ]

    def frames(self, name: str) -> dict[str, Any]:
        """Thumbnails of a stream's last images, and the history that the page draws."""
        self.check_stream(name)
        watch = self._watch(name)
        return {"stream": name, "frames": watch.frames(), "history": watch.history()}

    def stop(self) -> None:
        """Say that nothing new is taken, and end what listens to events."""
        self.stopping = True
        self.events.close()

    def close(self) -> None:
        """Stop, serve what waits, and close the pool, which writes the streams.

        Raises:
            OSError: When a stream could not be written; the pool is closed all the same.
        """
        with self._closing:
            self.stop()
            self._batcher.stop()
            try:
                self.pool.close()  # does nothing when it was closed
            except OSError as error:
                self._failure = error
                self.pool.close(save=False)
            if self._failure is not None:
                raise self._failure

    # In the thread that has the model --------------------------------------------------------

    def _in_turn(self, action: Callable[[], Any], name: str | None = None) -> Any:
        """Do something between two rounds; with ``name``, to a stream that must be there."""
        if name is not None:
            self.check_stream(name)
        try:
            return self._batcher.run(action).result()
        except RefusedError:
            raise
        except Exception as error:
            raise self._refusal(error, name) from error

    def _save(self, name: str) -> dict[str, Any]:
        self.check_stream(name)
        if self.pool.folder is None:
            raise RefusedError(
                409,
                "`folder` must be there to save a stream, but this server has none: start it with "
                "--folder.",
            )
        try:
            written = self.pool.snapshot(name)  # beside the model; only the copy takes a turn
        except OSError as error:
            raise RefusedError(507, str(error)) from error
        except (KeyError, RuntimeError) as error:
            raise self._refusal(error, name) from error
        return self._watch(name).summary() | {"written": written}

    def _make(self, name: str) -> bool:
        if name in self.pool:
            return False
        self.check_room([name])
        self.pool.stream(name, create=True)
        self._watch(name)
        self._tell("created", name)
        return True

    def _serve(self, items: list[Item]) -> None:
        """Serve a round: the images of one stream are one batch of it, if they have one shape."""
        by_stream: dict[str, list[list[Item]]] = {}
        self._begun.clear()
        for item in items:
            batches = by_stream.setdefault(item.stream, [])
            if batches and _shape(batches[-1][0]) == _shape(item):
                batches[-1].append(item)
            else:
                batches.append([item])
        if len(by_stream) > 1 and self.pool.one_by_one is None:
            first = {name: batches[0] for name, batches in by_stream.items()}
            if self._serve_together(first):
                by_stream = {name: batches[1:] for name, batches in by_stream.items()}
        for name, batches in by_stream.items():
            for batch in batches:
                self._serve_batch(name, batch)

    def _serve_together(self, batches: dict[str, list[Item]]) -> bool:
        """Serve a batch of each of several streams in one pass; False where it cannot be done.

        Nothing has happened then but that streams were made, and each is served by itself.
        """
        begun = time.monotonic()
        acts = {name: self._act(items) for name, items in batches.items()}
        try:
            for name, items in batches.items():
                self._make_for(name, items)
            found = self.pool.run_each(acts, lambda adapter, name: acts[name](adapter), wait=False)
        except Exception:
            return False
        self._observe(begun, sum(map(len, batches.values())))
        for (name, items), served in zip(batches.items(), found, strict=True):
            self._settle(name, items, served)
        return True

    def _serve_batch(self, name: str, items: list[Item]) -> None:
        try:
            self._make_for(name, items)
            self._answer(name, items)
        except Exception as error:
            if len(items) > 1 and not isinstance(error, NOT_OF_AN_IMAGE):
                for item in items:  # so that one image that fails does so alone
                    self._serve_batch(name, [item])
                return
            refusal = error if isinstance(error, RefusedError) else self._refusal(error, name)
            if name in self._watches:
                self._watches[name].failed += len(items)
            if name in self._begun:
                self._forget_unused(name)
            for item in items:
                item.future.set_exception(refusal)

    def _make_for(self, name: str, items: list[Item]) -> None:
        if any(item.create for item in items) and self._make(name):
            self._begun.add(name)

    def _forget_unused(self, name: str) -> None:
        """Forget a stream that was made for images of which none was served."""
        with suppress(KeyError, ValueError, RuntimeError, OSError):
            if self.pool.stream(name, wait=False).run(taken, False) == 0:
                self.pool.drop(name)
                self._watches.pop(name, None)
                self._tell("dropped", name)

    def _answer(self, name: str, items: list[Item]) -> None:
        begun = time.monotonic()
        with self.pool.stream(name, wait=False) as view:
            _bring(view)
            served = view.run(self._act(items))
        self._observe(begun, len(items))
        self._settle(name, items, served)

    def _act(self, items: list[Item]) -> Callable[[Adapter], _Served]:
        """What a batch does to an adapter that holds its stream."""

        def act(adapter: Adapter) -> _Served:
            images = torch.cat([item.image for item in items]).to(self._device())
            learning, before = adapter.session.learning, _last(adapter.events)
            first = taken(adapter)
            done = step(adapter, images, True, first + len(items))
            return _Served(learning, before, first, done, adapter.health, adapter.events)

        return act

    def _observe(self, begun: float, rows: int) -> None:
        self.metrics.batch_seconds.observe(time.monotonic() - begun)
        self.metrics.batch_rows.observe(rows)

    def _settle(self, name: str, items: list[Item], served: _Served) -> None:
        """Give each request its answer, and tell who watches."""
        done, events = served.step, served.events
        now, found = time.monotonic(), done.probabilities
        watch = self._watch(name)
        watch.frozen = not served.learning
        finite, labels = found.isfinite().all(1).tolist(), found.argmax(1).tolist()
        answered: list[tuple[Item, dict[str, Any]]] = []
        rows = zip(items, found.tolist(), labels, finite, strict=True)
        for index, (item, row, label, ok) in enumerate(rows, served.first):
            if not ok:
                watch.failed += 1
                item.future.set_exception(RefusedError(
                    422, "`image` must have values that the model can take, got ones whose "
                    "features overflow: nothing was learned from it; correct its scale."
                ))  # fmt: skip
                continue
            answer = {
                "stream": name,
                "index": index,
                "label": label,
                "class": self.class_names[label],
                "probabilities": row,
                "learned": done.learned,
                "latency": now - item.arrived,
            }
            answered.append((item, answer))
        figures = dict(served.health)
        due = watch.note([(answer, item.thumbnail) for item, answer in answered], figures)
        for item, answer in answered:
            self.metrics.latency.observe(answer["latency"])
            item.future.set_result(answer)
        if due:
            point = watch.history()[-1]
            self.events.publish("health", watch.summary() | {"point": point}, keep=False)
        for event in events[-1:] if _last(events) != served.before else []:
            self.events.publish("guard", {"stream": name, "at": time.time(), **plain(event)})
            log.info(
                "the guard of stream %s: %s", shown(name, 60), event["action"],
                extra={"stream": name, "action": event["action"], "reason": event["reason"]},
            )  # fmt: skip

    def _device(self) -> torch.device:
        first: Tensor | None = next(self.pool.adapter.model.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def _watch(self, name: str) -> StreamWatch:
        return self._watches.setdefault(name, StreamWatch(name, self._thumbnails))

    def _tell(self, what: str, name: str) -> None:
        data = {"stream": name, "at": time.time(), "what": what}
        self.events.publish("stream", data)
        log.info("stream %s: %s", shown(name, 60), what, extra={"stream": name, "event": what})

    def _refusal(self, error: Exception, name: str | None) -> RefusedError:
        """An error of the pool or of the model, as what the client is told."""
        words = told(words_of(error), 300)
        if self.pool.closed:
            return RefusedError(503, STOPPING)
        if isinstance(error, KeyError):  # dropped meanwhile
            return RefusedError(404, words)
        if isinstance(error, ElsewhereError):
            return RefusedError(409, words, 1.0)
        if isinstance(error, RuntimeError) and name in self.pool and self.pool.owned(str(name)):
            return RefusedError(409, words, 1.0)
        if isinstance(error, (ValueError, TypeError)):
            return RefusedError(422, words)
        if isinstance(error, OSError):
            reason = told(error.strerror or error)
            return RefusedError(
                507,
                f"`folder` must be one that can be written to, but it cannot ({reason}): mend it, "
                "and try again; the streams go on.",
            )
        log.error("stream %s", shown(name, 60), exc_info=error, extra={"stream": name})
        return RefusedError(500, f"the model failed ({type(error).__name__}: {told(error, 200)}).")


@dataclass
class _Served:
    """What a batch gave, and what its stream was and is.

    Args:
        learning: Whether the stream is not frozen.
        before: The last event of its guard before the batch, by :func:`_last`.
        first: Images of the stream before the batch.
        step: The predictions.
        health: As of the adapter, afterwards.
        events: As of the adapter, afterwards.
    """

    learning: bool
    before: Any
    first: int
    step: Step
    health: Any
    events: list[dict[str, Any]]


def _shape(item: Item) -> tuple[Any, ...]:
    return item.image.shape, item.image.dtype


def _bring(view: Any) -> bool:
    """Let the adapter hold a stream; return whether it learns.

    Raises:
        RefusedError: When its file is damaged, or of another model.
    """
    try:
        return view.session.learning
    except (ValueError, OSError) as error:
        raise RefusedError(409, told(error, 300)) from error


def _last(events: Sequence[dict[str, Any]]) -> Any:
    """What tells the last event of a guard from the one before."""
    return events and (len(events), events[-1]["step"], events[-1]["action"])
