"""One method on one stream: its predictions, their times, and the reports of the adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from experiments.records.health import batch_health
from experiments.run.cost import Passes, PeakMemory, Timer
from experiments.run.metrics import Scores, score
from experiments.run.totals import Totals
from tta import Adapter
from tta.core.component import log_probabilities
from tta.core.prediction import Report
from tta.streams import Batch, Stopwatch, Stream
from tta.streams.reading import read_ahead

__all__ = ["Images", "Step", "clean_error", "iter_evaluate"]

# A block is scored when it has so many batches, or took so long: numpy takes nearly as long for one
# batch as for all of them, and a GPU is waited for once.
BLOCK_BATCHES, BLOCK_SECONDS = 32, 0.2
SAMPLES = 8  # images that are kept of each visit to a domain
MEMORY_EVERY = 20  # batches; asking takes time, and a peak stays
Preprocess = Callable[[Tensor], Tensor]


class Images(Protocol):
    """Labelled images: items are a (3, H, W) tensor, uint8 or float in [0, 1], and a label."""

    def __len__(self) -> int: ...
    def __getitem__(self, position: int, /) -> tuple[Tensor, int]: ...


@dataclass
class Step:
    """The figures of one batch.

    Args:
        row: The batch's line in the results file.
        scores: The numbers of each image.
        error: Share of errors in the stream up to here.
        domain_error: Share of errors in the batch's domain up to here; None for a mixed batch.
        images: The first images of a visit to a domain, (up to `SAMPLES`, 3, H, W); None in batches
            that do not begin a visit.
    """

    row: dict[str, Any]
    scores: Scores
    error: float
    domain_error: float | None
    images: Tensor | None


@dataclass
class _Predicted:
    """A batch that is predicted and not yet scored.

    Args:
        batch: The batch without its images, which would be held until the block is scored.
        output: (B, C), on the model's device.
        report: The adapter's report of this batch.
        before: The adapter's report before this batch, which tells the resets since then.
        timer: Has timed the adapter's work.
        forwards: Images through the model.
        backwards: Images through the model's backward pass.
        latency: Time to the answer in plain forwards; None without a clock.
        was_reset: Whether the adapter was reset before this batch because the stream said so.
        health: What the batch's line holds of the adapter's health.
        images: See `Step`.
    """

    batch: Batch
    output: Tensor
    report: Report
    before: Report
    timer: Timer
    forwards: int
    backwards: int
    latency: float | None
    was_reset: bool
    health: dict[str, Any]
    images: Tensor | None


def iter_evaluate(
    adapter: Adapter,
    stream: Stream,
    device: torch.device,
    preprocess: Preprocess,
    totals: Totals | None = None,
    every: int | None = None,
) -> Generator[tuple[list[Step], Totals], None, None]:
    """Run `adapter` over `stream` and yield the figures of its batches, some batches at a time.

    The adapter is reset where the stream says so, and only predicts where it says not to adapt.
    Figures do not depend on how many batches are scored together.

    Args:
        adapter: A wrapped model on `device`.
        stream: From `tta.streams.build`, from its first batch on.
        device: Where the model is.
        preprocess: Pixels (B, 3, H, W) in [0, 1] to what the model takes.
        totals: Those of the batches before, to go on after them; `adapter` must be as it was then.
        every: Also yield after every batch whose number is a multiple of this.

    Yields:
        The figures of the batches since the last time, and the totals so far (one object, which is
        updated). The adapter is as the last of these batches left it.
    """
    totals = Totals(adapter.num_classes) if totals is None else totals
    memory, passes = PeakMemory(device), Passes(adapter.model)
    block: list[_Predicted] = []
    rest = stream.from_step(totals.batches)
    if rest.clock is not None and rest.stopwatch is not None:
        rest.stopwatch = Stopwatch(rest.clock, totals.utilities.spent)
    begun, end = time.perf_counter(), totals.batches + len(rest)
    try:
        for predicted in _iter_predict(adapter, rest, device, preprocess, passes):
            block.append(predicted)
            done = predicted.batch.step + 1
            if done % MEMORY_EVERY == 0 or done == end:
                totals.peak_memory = max(totals.peak_memory, memory.read())
            full = len(block) == BLOCK_BATCHES or time.perf_counter() - begun >= BLOCK_SECONDS
            if full or done == end or (every is not None and done % every == 0):
                if rest.stopwatch is not None:
                    totals.utilities.spent = rest.stopwatch.spent
                yield _score(adapter, block, totals, rest), totals
                block, begun = [], time.perf_counter()
    finally:
        passes.close()


def _iter_predict(
    adapter: Adapter, stream: Stream, device: torch.device, preprocess: Preprocess, passes: Passes
) -> Iterator[_Predicted]:
    """Adapt and predict batch by batch; waits for a GPU no more than the adapter does."""
    domain, report = None, adapter.report
    for batch in stream:
        was_reset = batch.reset and batch.step > 0  # nothing was learned before the first batch
        if was_reset:
            adapter.reset()
            report = adapter.report
        pixels = batch.images if batch.window is None else batch.window
        passes.restart()
        output, timer = _predict(adapter, stream, batch, preprocess(pixels.to(device)), passes)
        images = batch.images[:SAMPLES].clone() if batch.domain != domain else None
        before, report, domain = report, adapter.report, batch.domain
        yield _Predicted(
            replace(batch, images=batch.images.new_empty(0), window=None),
            output[-len(batch) :].clone(),  # a model may use one tensor for all its outputs
            report,
            before,
            timer,
            passes.forward,
            passes.backward,
            batch.latency if stream.stopwatch is None else stream.stopwatch.latency,
            was_reset,
            batch_health(adapter.health, batch.visit),
            images,
        )


def _predict(
    adapter: Adapter, stream: Stream, batch: Batch, images: Tensor, passes: Passes
) -> tuple[Tensor, Timer]:
    """Return the adapter's output (B, C) and its time, of which a measured clock is told."""

    def adaptive() -> tuple[Tensor, Timer]:
        timer = Timer(images.device)
        with nullcontext() if batch.adapt else adapter.frozen():
            output = _logits(adapter, images)
        return output, timer.stop()

    def plain() -> Any:
        with adapter.frozen(), torch.no_grad(), passes.uncounted():
            return adapter.model(images)

    if stream.stopwatch is None or not batch.adapt:
        return adaptive()
    return stream.stopwatch.run(adaptive, plain)


def _logits(adapter: Adapter, images: Tensor) -> Tensor:
    """The adapter's logits (B, C), which may be a part of what it returns."""
    result = adapter(images)
    return result if isinstance(result, Tensor) else adapter.network.reader.read(result)


def _score(
    adapter: Adapter, block: Sequence[_Predicted], totals: Totals, stream: Stream
) -> list[Step]:
    """Compute the figures of some batches, and add them to the totals."""
    output = torch.cat([predicted.output for predicted in block])
    labels = torch.cat([predicted.batch.labels for predicted in block]).cpu()
    together = score(output.argmax(1).cpu(), log_probabilities(adapter, output).cpu(), labels)
    steps, stop = [], 0
    for predicted in block:
        batch, report = predicted.batch, predicted.report
        start, stop = stop, stop + len(batch)
        scores = together.rows(slice(start, stop))
        own_resets = max(report.resets - predicted.before.resets, 0)
        row = {
            "step": batch.step,
            "domain": batch.domain,
            "severity": batch.severity,
            "images": len(batch),
            "errors": int(scores.values["error"].sum()),
            **scores.means("batch"),
            "concentration": scores.concentration,
            "loss": report.loss,
            "selected": int(report.selected) if report.stepped and batch.adapt else 0,
            "resets": totals.resets + int(predicted.was_reset) + own_resets,
            "late": batch.late,
            "seconds": predicted.timer.seconds(),
            **predicted.health,
        }
        if (recurrence := stream.recurrence(batch.visit)) is not None:
            row["recurrence"] = recurrence
        totals.add(row, scores, batch.domains, batch.severities)
        if stream.clock is not None and predicted.latency is not None:
            row["latency"] = predicted.latency
            right = ~scores.values["error"].astype(bool)
            totals.utilities.add(stream.clock, right, batch.late, predicted.latency)
        totals.forwards += predicted.forwards
        totals.backwards += predicted.backwards
        tally = totals.by_domain.get(batch.domain)
        domain_error = None if tally is None else tally.errors / tally.images
        steps.append(Step(row, scores, totals.error, domain_error, predicted.images))
    return steps


def clean_error(
    adapter: Adapter,
    images: Images,
    batch_size: int,
    seed: int,
    device: torch.device,
    preprocess: Preprocess,
    readers: int = 0,
) -> float:
    """Share of errors on clean images with the adapter frozen, in a shuffled order.

    Args:
        adapter: A wrapped model on `device`.
        images: The clean images.
        batch_size: Images at once.
        seed: Seed of the order.
        device: Where the model is.
        preprocess: As in `iter_evaluate`.
        readers: Threads that decode images ahead.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).split(batch_size)

    def read(positions: Tensor) -> tuple[Tensor, Tensor]:
        pictures, labels = zip(*(images[i] for i in positions.tolist()), strict=True)
        return torch.stack(pictures), torch.tensor(labels)

    wrong = 0
    with adapter.frozen():
        for _, (pixels, labels) in read_ahead(order, read, readers):
            pixels = pixels.to(device)
            pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
            output = _logits(adapter, preprocess(pixels)).cpu()
            wrong += int(((output.argmax(1) != labels) | output.isnan().any(1)).sum())
    return wrong / len(images)
