"""``tta run``: predictions of a folder, a video, a camera or an address, as JSON lines."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tta.cli.common import (
    add_folder,
    add_method,
    add_model,
    check_writable,
    open_from,
    whole,
    wrap_from,
)
from tta.core.checks import folder_like, parsed_json, path_like, shown, told
from tta.core.files import replacing, writing

if TYPE_CHECKING:
    from tta.core.adapter import Adapter
    from tta.runtime.model_strings import OpenedModel
    from tta.runtime.pipeline import Pipeline, Result
    from tta.runtime.pool import StreamPool
    from tta.runtime.resuming import JsonLines, Order

__all__ = ["add_arguments", "run"]

INTERRUPTED = 130  # exit status that shells give for the signal
WORKERS = 2
QUEUE = 64
INTERVAL = 10.0  # seconds
SETTINGS = "run.json"
STREAMS = "streams"  # in the folder, what each has learned
# What else it holds: of the pool, and of this command.
POOL = ("config.json", "adapter.safetensors", "start.safetensors")
LINES = ("events.jsonl", "order.jsonl")
SAME = ("model", "weights", "method", "source", "batch_size", "seed")  # to go on with a run
SHOWN_STREAMS = 3
CLEAR, END = "\r\x1b[K", "\n"  # of a line on a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_model(parser)
    add = parser.add_argument
    add(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="a folder of pictures (which may be written to meanwhile), a video, the number of a "
        "camera, or an address such as rtsp://host/path; several are streams of their own",
    )
    add("--out", required=True, metavar="FILE", help="where predictions go, as JSON lines")
    add_method(parser)
    add_folder(parser, "FILE.state")
    add("--fresh", action="store_true", help="begin anew, in place of going on with FILE")
    add(
        "--late",
        choices=("wait", "skip", "drop"),
        default="wait",
        help="frames that come too fast: wait for room, skip learning, or drop the oldest too "
        "(default: wait)",
    )
    add("--queue", type=whole(1), default=QUEUE, metavar="N", help="frames that may wait")
    add("--workers", type=whole(1, 256), default=WORKERS, metavar="N", help="decoding threads")
    add(
        "--max-wait",
        type=_seconds,
        default=0.05,
        metavar="S",
        help="seconds that a frame of a camera waits for its batch to fill (default: 0.05)",
    )
    add(
        "--follow",
        type=_seconds,
        default=1.0,
        metavar="S",
        help="seconds without a new picture until a folder is complete; inf for never (default: 1)",
    )
    add(
        "--interval",
        type=_seconds,
        default=INTERVAL,
        metavar="S",
        help=f"seconds between snapshots of what was learned (default: {INTERVAL:g})",
    )


def run(args: argparse.Namespace) -> int:
    """Predict all frames; go on with what an earlier run of the same command has left.

    Raises:
        ValueError: When FILE or the folder belong to something else, or there were no frames.
    """
    from tta.runtime.frames import Several
    from tta.runtime.pipeline import Pipeline
    from tta.runtime.resuming import JsonLines, Order, Resumed, written
    from tta.runtime.sources import open_source

    out = path_like("out", args.out)
    folder = folder_like("folder", f"{out}.state" if args.folder is None else args.folder)
    source = open_source(args.sources, follow=args.follow)
    opened = open_from(args)
    begins = args.fresh or _nothing_in(folder, out)
    # What is refused here leaves no file behind, and takes none away.
    adapter = wrap_from(args, opened, health=True) if begins else None
    # Without a folder of its own, that lies beside `out`.
    check_writable("out" if args.folder is None else "folder", folder)
    with contextlib.ExitStack() as open_now:
        lines = JsonLines(out, "out")
        open_now.callback(lines.close)
        _check_own(folder, out)
        if begins and (args.fresh or (folder / SETTINGS).is_file()):
            _clear(folder)
            lines.clear()
        _check_settings(args, folder, lines)
        done = written(lines)
        events = JsonLines(folder / "events.jsonl", "folder")
        open_now.callback(events.close)
        order = Order(folder / "order.jsonl")
        open_now.callback(order.close)
        pool = _pool(args, opened, folder, adapter)
        # Frames from the last snapshot on are predicted and learned from again, so that the end is
        # that of a run without a break; what is written of them is not written again.
        starts = {name: _taken(pool, name) for name in pool.streams()}
        _check_there(lines, pool, starts)
        again = [Resumed(part, starts if not part.live else done, order)
                 for part in source.parts()]  # fmt: skip
        pipeline = Pipeline(
            pool,
            Several(again),
            batch_size=args.batch_size,
            max_wait=args.max_wait,
            transform=opened.transform,
            workers=args.workers,
            queue=args.queue,
            late=args.late,
        )
        before = sum(1 for _ in lines)
        watch = _Watch(pool, pipeline, events, before, starts, [lines, order])
        try:
            with _ended_by_signals(pipeline) as signals:
                _write_all(args, pipeline, opened, lines, watch, done)
            watch.finished = True
        finally:
            watch.end()
            # A batch that an error came after, and whose lines are not written, must not count.
            pool.close(save=watch.all_written())
    if signals:
        return INTERRUPTED
    counts = pipeline.counts
    if not done and not counts["learned"] + counts["skipped"]:
        raise ValueError(
            f"`SOURCE` must give at least one frame, but {told(args.sources[0], 80)} gave none"
            f"{' that could be predicted' if counts['failed'] else ''}: check it."
        )
    return 0


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError("must be a number of seconds, at least 0")
    return value


def _nothing_in(folder: Path, out: Path) -> bool:
    """Whether no earlier run has predicted or learned anything."""
    predicted = out.is_file() and out.stat().st_size > 0
    return not predicted and not any((folder / STREAMS).glob("*"))


def _check_own(folder: Path, out: Path) -> None:
    """Refuse a folder of something else, such as a pool's, a saved adapter's or the user's own."""
    if not folder.is_dir() or (folder / SETTINGS).is_file():
        return
    own = (out.name, SETTINGS) if out.resolve().parent == folder.resolve() else (SETTINGS,)
    # Writers that were killed leave hidden files.
    others = [p.name for p in folder.iterdir() if not p.name.startswith((".", *own))]
    if others:
        raise ValueError(
            f"`folder` must be new, empty, or one that this command has made, but {told(folder)} "
            f"holds {shown(min(others), 60)}: choose another."
        )


def _clear(folder: Path) -> None:
    """Remove what an earlier run has learned, and nothing else."""
    shutil.rmtree(folder / STREAMS, ignore_errors=True)
    for name in (*POOL, *LINES, SETTINGS):
        (folder / name).unlink(missing_ok=True)


def _check_settings(args: argparse.Namespace, folder: Path, lines: JsonLines) -> None:
    """Make the folder of a new run, or see that an old one is of the same command."""
    place = folder / SETTINGS
    mine = {name: getattr(args, name) for name in SAME}
    if not place.exists():
        if not lines.empty:
            raise ValueError(
                f"`out` must be a new file, or one with what was learned beside it, but "
                f"{told(folder)} is not there: choose another file, or pass --fresh to replace it."
            )
        with writing("folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(place) as part:
                part.write_text(json.dumps(mine))
        return
    try:
        theirs = parsed_json(place.read_bytes())
    except ValueError:
        theirs = None
    theirs = theirs if isinstance(theirs, dict) else {}
    for name, value in mine.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"`{name}` must be that of the run in {told(folder, 60)} to go on with it, "
                f"{shown(theirs.get(name), 50)}, got {shown(value, 50)}: choose another file, or "
                "pass --fresh to replace it."
            )


def _check_there(lines: JsonLines, pool: StreamPool, starts: dict[str, int]) -> None:
    """See that the predictions are there of what the streams have learned."""
    if lines.empty and any(starts.values()):
        pool.close(save=False)
        raise ValueError(
            f"`out` must hold the predictions of the run to go on with, but {told(lines.path)} is "
            f"gone or empty, after {sum(starts.values()):,} frames: put it back, or pass --fresh "
            "to begin anew."
        )


def _pool(
    args: argparse.Namespace, opened: OpenedModel, folder: Path, adapter: Adapter | None
) -> StreamPool:
    from tta.cli.common import source_from
    from tta.runtime.pool import StreamPool

    # Snapshots are made between batches whose predictions are written, and by nobody else.
    most: dict[str, Any] = {"capacity": 2**31 - 1, "interval": None}
    if (folder / "config.json").exists() and adapter is None:
        source = source_from(args, opened)
        return StreamPool.open(opened.model, folder, source=source, **most)
    adapter = adapter or wrap_from(args, opened, health=True)
    return StreamPool(adapter, folder=folder, **most)


def _taken(pool: StreamPool, name: str) -> int:
    from tta.runtime.steps import taken

    return pool.stream(name).run(taken, False)


def _write_all(
    args: argparse.Namespace,
    pipeline: Pipeline,
    opened: OpenedModel,
    lines: JsonLines,
    watch: _Watch,
    done: dict[str, int],
) -> None:
    saved = time.monotonic()
    for results in pipeline.batches():
        new = [result for result in results if result.index >= done.get(result.stream, 0)]
        lines.add(*(_line(result, opened) for result in new))
        watch.look(results, len(new))
        if time.monotonic() - saved >= args.interval:
            watch.save()
            saved = time.monotonic()


def _line(result: Result, opened: OpenedModel) -> dict[str, Any]:
    return {
        "stream": result.stream,
        "index": result.index,
        "source": result.source,
        "label": result.label,
        "class": opened.class_name(result.label),
        "probability": float(result.probabilities[result.label]),
        "learned": result.learned,
        "latency": round(result.latency, 6),
    }


@contextlib.contextmanager
def _ended_by_signals(pipeline: Pipeline) -> Iterator[list[int]]:
    """Take no more frames after Ctrl-C or SIGTERM, and finish what is begun; a second one ends it.

    Yields:
        The signals that have come.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def stop(number: int, _: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        # Not here, as this thread may be in the middle of what closing waits for.
        threading.Thread(target=pipeline.close, name="tta-close", daemon=True).start()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watch:
    """The progress line, and health and events in a file.

    Args:
        pool: Whose streams are watched.
        pipeline: Which is asked for its counts.
        events: Where health and events go.
        before: Predictions of earlier runs.
        starts: Frames of each stream that these have used up.
        first: Files that the disk is to hold before what was learned from what is in them.
    """

    def __init__(
        self,
        pool: StreamPool,
        pipeline: Pipeline,
        events: JsonLines,
        before: int,
        starts: dict[str, int],
        first: list[JsonLines | Order],
    ) -> None:
        self.first = first
        self.pool, self.pipeline, self.events, self.before = pool, pipeline, events, before
        self.written = 0
        self.finished = False  # with all batches
        self.begun = time.monotonic()
        self._begun_at = starts
        self._health: dict[str, dict[str, Any]] = {}  # of the last batch of each stream
        self._seen: dict[str, int] = {}  # the last event of each stream
        self._taken: dict[str, int] = {}  # frames of each stream whose lines are written
        self._drawn = 0.0
        self._live = sys.stderr.isatty()

    def look(self, results: list[Result], new: int) -> None:
        """Take in a batch whose predictions are written, so many of them now."""
        from tta.runtime.steps import taken

        self.written += new
        if results:
            stream, index = results[-1].stream, results[-1].index
            health, events, self._taken[stream] = self.pool.stream(stream).run(
                lambda a: (_plain(a.health), a.events[-9:], taken(a)), False
            )
            self._health[stream] = {"index": index, **health}
            for event in events:
                self._tell(stream, index, event)
        every = 0.25 if self._live else 10.0
        if time.monotonic() - self._drawn > every:
            self._drawn = time.monotonic()
            self._draw()

    def save(self) -> None:
        """Write what was learned, and how the streams do; a disk that is full stops nothing."""
        with contextlib.suppress(OSError):
            for stream, health in self._health.items():
                self.events.add({"stream": stream, "kind": "health", "time": time.time(), **health})
        self._health.clear()
        with contextlib.suppress(OSError):  # of the pool, it is logged
            for file in self.first:
                file.flush()
            self.pool.snapshot()

    def all_written(self) -> bool:
        """Whether all predictions are written of what the streams have learned since they began.

        Where there are none, nothing was learned, and another run may begin in this one's place.
        """
        from tta.runtime.steps import taken

        if not self.before + self.written:
            return False
        known = self._begun_at | self._taken
        return self.finished or all(
            self.pool.stream(name).run(taken, False) == known.get(name, 0)
            for name in self.pool.streams()
        )

    def end(self) -> None:
        """Say how it went."""
        if self.all_written():
            with contextlib.suppress(OSError):
                self.save()
        self._draw()
        end = END if self._live else ""
        if self.written:
            times = self.pipeline.latencies.items()
            text = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in times)
            end += f"latency {text}\n"
        print(end, end="", file=sys.stderr)

    def _tell(self, stream: str, index: int, event: dict[str, Any]) -> None:
        if event["step"] == self._seen.get(stream):
            return
        self._seen[stream] = event["step"]
        figures = _plain(event["figures"])
        line = {"stream": stream, "kind": "event", "time": time.time(), "index": index}
        with contextlib.suppress(OSError):
            self.events.add(line | {**event, "figures": figures})
        print(
            f"{CLEAR if self._live else ''}{stream}, frame {index}: {event['action']}, "
            f"{event['reason']}",
            file=sys.stderr,
        )

    def _draw(self) -> None:
        counts = self.pipeline.counts
        seconds = time.monotonic() - self.begun
        parts = [
            f"{self.before + self.written:,} predictions, {self.written / seconds:.1f} a second"
        ]
        parts += [
            f"{counts[key]:,} {key}" for key in ("skipped", "dropped", "failed") if counts[key]
        ]
        for stream, health in list(self._health.items())[-SHOWN_STREAMS:]:
            accuracy = health.get("estimated_accuracy")
            known = isinstance(accuracy, float)
            text = f"about {accuracy:.0%} right" if known else f"entropy {health['entropy']:.2f}"
            parts.append(f"{stream}: {text}, {health['action']}")
        width = shutil.get_terminal_size().columns - 1
        text = told("; ".join(parts), max(width, 40) if self._live else 300)
        print(CLEAR + text if self._live else text, file=sys.stderr,
              end="" if self._live else "\n", flush=True)  # fmt: skip


def _plain(figures: Any) -> dict[str, Any]:
    """Figures as JSON holds them; one that is not finite is None."""
    found = {}
    for key, value in figures.items():
        if isinstance(value, float):
            value = round(value, 6) if value == value and abs(value) != float("inf") else None
        found[key] = value if isinstance(value, (str, int, float, bool)) else None
    return found
