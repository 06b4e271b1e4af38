"""Frames in, predictions out: ``Pipeline``.

Example::

    pool = tta.runtime.StreamPool(tta.wrap(model, "auto"), folder="streams")
    source = tta.runtime.open_source(["rtsp://door/live", "rtsp://yard/live"])
    for result in tta.runtime.Pipeline(pool, source, late="skip"):
        print(result.stream, result.index, result.label, f"{result.latency:.3f} s")
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta.core.adapter import Adapter
from tta.core.checks import LARGE, boolean, number, one_of, shown, told, whole_number
from tta.core.pictures import as_rgb, is_picture
from tta.runtime import capturing, lanes
from tta.runtime.extras import needed
from tta.runtime.frames import EXTRA, IterableSource, Source
from tta.runtime.intake import LATE, Arrived, Batch, Intake
from tta.runtime.model_strings import own_transform
from tta.runtime.pool import StreamPool
from tta.runtime.sources import open_source
from tta.runtime.steps import Direct, Lagging, Pooled, Replaying, Server, Step

__all__ = ["Pipeline", "Result"]

log = logging.getLogger("tta.runtime")
MOST_WORKERS = 256
MOST_STALE = 1000
MOST_TOGETHER = 32  # streams
REMEMBERED = 10_000  # latencies
NAMED = (str, PathLike, int, Source)  # what `open_source` takes, one or several of them


@dataclass(frozen=True, eq=False)
class Result:
    """The prediction of one frame.

    Args:
        stream: Which the frame is of.
        index: Its number in the stream, from 0; frames that failed or were dropped have one too.
        probabilities: (C,) float32, on the CPU.
        label: Of the most probable class.
        latency: Seconds from the arrival of the frame to this result.
        learned: Whether something that moves has learned from the frame's batch.
        source: The file that the frame is from, or the place in it; None where there is none.
    """

    stream: str
    index: int
    probabilities: Tensor
    label: int
    latency: float
    learned: bool
    source: str | None = None


class Pipeline:
    """Reads, decodes, batches and predicts; iterate it once for the results.

    The results of a stream come in the order of its frames. Everything is read and decoded in
    threads, and predicted where the results are asked for; the threads end with the iteration,
    however that ends. ``counts`` says how many frames have come (``frames``), and how many of these
    were ``learned`` from, predicted without that (``skipped``), ``dropped`` or ``failed``; errors
    of a source count as failed too, and are logged.

    Args:
        adapter_or_pool: An adapter serves all frames as one stream; a pool has one for each
            stream, which is made if it is not there, and batches of its own.
        source: What :func:`open_source` gave or takes, or an iterable of images or of ``(stream,
            image)``: tensors as the model takes them, pictures of Pillow, or arrays (H, W, 3) of
            levels to 255.
        batch_size: Images in a batch, at most.
        max_wait: Seconds that a frame of a live source waits for its batch to fill.
        transform: From a picture of Pillow in RGB (or a tensor, where the source has these) to a
            tensor (C, H, W) as the model takes it. None stands for that of the model's timm config,
            or pixels in [0, 1], for pictures, and for none for tensors.
        workers: Threads that decode and transform.
        queue: Frames that may wait; at least a batch of each stream.
        late: What happens to frames that come too fast: "wait" reads no more until there is room;
            "skip" predicts without learning while more than ``queue`` wait, and reads no more at
            twice as many; "drop" drops the oldest then.
        staleness: Batches by which learning may lag behind predictions. 0 predicts and learns in
            turn, as a loop of your own; above, a copy of the model predicts while the adapter
            learns in a thread, so what methods return after a step of their own is not returned.
        graphs: Whether, on a GPU, the whole step on full batches is captured as a CUDA graph, and
            replayed. Where that cannot be, the pipeline goes on as without, and says why in
            ``pipeline.graphs`` and the log.
        on_result: Called with each result before it is given.
        together: Whether batches of several streams of a pool that may go at the same time go
            through the model in one pass, where the pool can (``pool.one_by_one``). Results are
            then those of a loop over each stream up to rounding, else bit for bit.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: When a number is out of its range, or a value is not possible here.

    Example:
        >>> import torch, tta
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10))
        >>> frames = torch.rand(5, 3, 4, 4)
        >>> pipeline = tta.runtime.Pipeline(tta.wrap(net, "source"), frames, batch_size=2)
        >>> [result.index for result in pipeline]
        [0, 1, 2, 3, 4]
    """

    def __init__(
        self,
        adapter_or_pool: Adapter | StreamPool,
        source: Source | Iterable[Any],
        *,
        batch_size: int = 8,
        max_wait: float = 0.05,
        transform: Callable[[Any], Tensor] | None = None,
        workers: int = 1,
        queue: int = 64,
        late: str = "wait",
        staleness: int = 0,
        graphs: bool = False,
        on_result: Callable[[Result], Any] | None = None,
        together: bool = False,
    ) -> None:
        pool = adapter_or_pool if isinstance(adapter_or_pool, StreamPool) else None
        adapter = adapter_or_pool if pool is None else pool.adapter
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"`adapter_or_pool` must be a tta.Adapter or a StreamPool, got "
                f"{type(adapter).__name__}: pass what tta.wrap returned."
            )
        for name, function in (("transform", transform), ("on_result", on_result)):
            if function is not None and not callable(function):
                raise TypeError(f"`{name}` must be a function, got {shown(function)}: pass one.")
        self._images = _Images(adapter, transform)
        staleness = whole_number("staleness", staleness, 0, MOST_STALE)
        self._check_device(boolean("graphs", graphs), staleness, pool)
        self._graphs = _without_graphs(staleness, pool) if graphs else ""
        self._source = _as_source(source)
        batch_size = whole_number("batch_size", batch_size, 1)
        self._intake = Intake(
            self._source.parts(),
            self._images.prepare,
            batch_size=batch_size,
            max_wait=number("max_wait", max_wait, 0, LARGE),
            workers=whole_number("workers", workers, 1, MOST_WORKERS),
            queue=whole_number("queue", queue, 1),
            late=one_of("late", late, LATE),
            apart=pool is not None,
        )
        graph = capturing.graph_on(self._images.device) if graphs and not self._graphs else None
        self._make: Callable[[], Server] = lambda: _server(
            adapter, pool, staleness, batch_size, graph, self._images.lanes
        )
        self._replaying: Replaying | None = None
        self._together = boolean("together", together)
        if together and pool is None:
            raise ValueError(
                "`together` must be False for an adapter, whose frames are one stream, got True: "
                "pass a StreamPool, or leave it out."
            )
        self._on_result = on_result
        self._latencies: deque[float] = deque(maxlen=REMEMBERED)
        self._begun = threading.Lock()

    def __iter__(self) -> Iterator[Result]:
        """The results; the threads start with the first one.

        Raises:
            RuntimeError: When this was called before.
        """
        return _flat(self.batches())

    def batches(self) -> Generator[list[Result], None, None]:
        """The results of each batch, in place of those of each frame.

        When a list is given, its stream has learned from that batch and from none after it.

        Raises:
            RuntimeError: When the pipeline was iterated before.
        """
        if not self._begun.acquire(blocking=False):
            raise RuntimeError("this pipeline was iterated before: make another, with a source.")
        return self._batches()

    def run(self) -> dict[str, int]:
        """Go through all frames, for ``on_result``; return the counts."""
        for _ in self:
            pass
        return self.counts

    def close(self) -> None:
        """End; what is being predicted is still predicted. Ending the iteration does it too."""
        self._intake.close()

    @property
    def counts(self) -> dict[str, int]:
        """What has become of the frames so far, see above."""
        return dict(self._intake.counts)

    @property
    def latencies(self) -> dict[str, float]:
        """Median, 95th and 99th percentile of the last 10,000 latencies, in seconds."""
        values = list(self._latencies) or [float("nan")]
        cuts = np.quantile(values, (0.5, 0.95, 0.99))
        return dict(zip(("p50", "p95", "p99"), map(float, cuts), strict=True))

    @property
    def graphs(self) -> str:
        """What has come of ``graphs=True`` so far, in words; empty without it."""
        return self._graphs if self._replaying is None else self._replaying.outcome

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _batches(self) -> Generator[list[Result], None, None]:
        server = self._make()
        self._replaying = server if isinstance(server, Replaying) else None
        if self._graphs:
            log.warning("%s", self._graphs)
        pool = server.pool if isinstance(server, Pooled) and self._together else None
        try:
            self._intake.start()
            while (batch := self._intake.take()) is not None:
                mixed = pool is not None and pool.one_by_one is None
                batches = self._intake.take_beside(batch, MOST_TOGETHER) if mixed else [batch]
                done = self._serve_each(server, batches) if len(batches) > 1 else None
                for number, one in enumerate(batches):
                    yield self._serve(server, one) if done is None else done[number]
        finally:
            self.close()
            server.close()

    def _serve(self, server: Server, batch: Batch) -> list[Result]:
        """The results of a batch."""
        stream, frames = batch.frames[0].stream, batch.frames
        try:
            step = server.serve(stream, *self._arguments(batch))
        except (ValueError, TypeError) as error:
            if not str(error).startswith("`images`"):
                raise
            self._intake.fail(stream, told(error, 300), len(frames))
            return []
        return self._results(frames, step)

    def _serve_each(self, server: Server, batches: list[Batch]) -> list[list[Result]] | None:
        """The results of batches of several streams; None where each is to be served by itself."""
        assert isinstance(server, Pooled)
        try:
            steps = server.serve_each({b.frames[0].stream: self._arguments(b) for b in batches})
        except Exception:  # which is one batch's, and comes again
            return None
        return [self._results(b.frames, step) for b, step in zip(batches, steps, strict=True)]

    def _arguments(self, batch: Batch) -> tuple[Tensor, bool, int]:
        """Images, whether they are learned from, and frames of the stream that are then used up."""
        frames = batch.frames
        images = self._images.stack([frame.image.result() for frame in frames])
        return images, not batch.late, frames[-1].index + 1

    def _results(self, frames: list[Arrived], step: Step) -> list[Result]:
        counts, now = self._intake.counts, time.monotonic()
        made = [self._result(frame, step, row, now) for row, frame in enumerate(frames)]
        results = [result for result in made if result is not None]
        counts["learned" if step.learned else "skipped"] += len(results)
        if self._on_result is not None:
            for result in results:
                self._on_result(result)
        return results

    def _result(self, frame: Any, step: Step, row: int, now: float) -> Result | None:
        probabilities = step.probabilities[row]
        if not bool(torch.isfinite(probabilities).all()):
            self._intake.fail(frame.stream, f"frame {frame.index} has no finite prediction")
            return None
        latency = now - frame.at
        self._latencies.append(latency)
        label = int(probabilities.argmax())
        return Result(
            frame.stream, frame.index, probabilities, label, latency, step.learned, frame.source
        )

    def _check_device(self, graphs: bool, staleness: int, pool: StreamPool | None) -> None:
        if graphs and capturing.graph_on(self._images.device) is None:
            raise ValueError(
                f"`graphs` must be False on {self._images.device.type}, got True: CUDA graphs need "
                "a GPU."
            )
        if staleness and pool is not None:
            raise ValueError(
                f"`staleness` must be 0 for a pool, got {staleness}: its streams take turns on one "
                "model; pass an adapter, or a pipeline for each."
            )


def _flat(batches: Generator[list[Result], None, None]) -> Iterator[Result]:
    try:
        for results in batches:
            yield from results
    finally:
        batches.close()


class _Images:
    """From what frames hold to what the model takes."""

    def __init__(self, adapter: Adapter, transform: Callable[[Any], Any] | None) -> None:
        model = adapter.network.model
        first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.device, self.dtype = first.device, first.dtype
        self.lanes = lanes.lanes_on(self.device)
        self.transform = transform
        self.of_pictures = own_transform(model) if transform is None else transform

    def prepare(self, given: Any) -> Any:
        """An image as the model takes it, (C, H, W), on its way to the device."""
        if callable(given) and not isinstance(given, Tensor):
            given = given()
        if isinstance(given, np.ndarray):
            given = _from_array(given)
        if is_picture(given):
            found: Any = self.of_pictures(as_rgb(given, "image"))
        elif isinstance(given, Tensor):
            found = given if self.transform is None else self.transform(given)
        else:
            raise TypeError(
                f"`image` must be a tensor, a picture or an array, got a {type(given).__name__}: "
                "convert it, and leave out labels."
            )
        if not isinstance(found, Tensor) or found.ndim == 0:
            raise TypeError(
                f"`transform` must return a tensor (C, H, W), got {shown(found)}: correct it."
            )
        return self.lanes.upload(found.detach())

    def stack(self, images: list[Any]) -> Tensor:
        """A batch of prepared images, where the model is."""
        taken: list[Tensor] = [self.lanes.take(image) for image in images]
        if len({image.device for image in taken}) > 1:
            taken = [image.to(self.device) for image in taken]
        batch = torch.stack(taken)
        return batch.to(self.device, self.dtype if batch.is_floating_point() else None)


def _from_array(array: np.ndarray) -> Any:
    """A picture of levels (H, W, 3) or (H, W); any other array as a tensor."""
    if array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        return needed("PIL.Image", EXTRA).fromarray(array)
    return torch.from_numpy(np.ascontiguousarray(array))


def _as_source(source: Any) -> Source:
    if isinstance(source, Source):
        return source
    several = isinstance(source, (list, tuple)) and all(isinstance(one, NAMED) for one in source)
    if isinstance(source, (dict, *NAMED)) or (several and source):  # no image is one of these
        return open_source(source)
    if not isinstance(source, Iterable):
        raise TypeError(
            f"`source` must be an iterable of images or what open_source() gives, got "
            f"{shown(source)}: pass one of these."
        )
    return IterableSource(source)


def _without_graphs(staleness: int, pool: StreamPool | None) -> str:
    """Why no step of such a pipeline is captured, or nothing."""
    if pool is not None:
        return "steps are not captured: the streams of a pool take turns on one model"
    if not staleness:
        return ""
    batches = "1 batch" if staleness == 1 else f"{staleness} batches"
    return f"steps are not captured: learning may lag behind by {batches}"


def _server(
    adapter: Adapter,
    pool: StreamPool | None,
    staleness: int,
    batch_size: int,
    graph: Callable[[], capturing.Graph] | None,
    beside: lanes.Lanes,
) -> Server:
    if pool is not None:
        return Pooled(pool)
    if graph is not None:
        return Replaying(adapter, batch_size, graph)
    return Lagging(adapter, staleness, beside) if staleness else Direct(adapter)
