"""One method over one stream: predictions, times, and what the adapter reported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.cost import Passes, PeakMemory, start_timer
from experiments.data import LabelledSet
from experiments.metrics import Scores, Totals, log_probabilities, score
from tta import Adapter
from tta.slots import Report
from tta.streams import Batch, Stream

__all__ = ["Step", "clean_error", "iter_evaluate"]

# Batches of so many seconds, or so many batches, are scored at once: numpy and a GPU take nearly
# as long for one.
SECONDS, MOST = 0.2, 32
SAMPLES = 8  # images that are kept of each stretch of a domain
MEMORY_EVERY = 20  # batches; asking takes time, and a peak stays
Preprocess = Callable[[Tensor], Tensor]


@dataclass
class Step:
    """What one batch gave.

    Args:
        row: The batch's line in the results file.
        scores: Of each image.
        error: Share of errors in the stream up to here.
        images: The first (up to `SAMPLES`, 3, H, W) where a stretch of a domain begins, or None.
    """

    row: dict[str, Any]
    scores: Scores
    error: float
    images: Tensor | None


@dataclass
class _Predicted:
    """A batch whose predictions are not looked at yet.

    Args:
        batch: What is known of it but for its images.
        output: (B, C), on the model's device.
        report: The adapter's.
        seconds: Gives the time that the adapter took; waits for a GPU.
        forwards: Images through the model.
        backwards: Images through its backward.
        resets: Since the stream's start.
        images: See `Step`.
    """

    batch: Batch
    output: Tensor
    report: Report
    seconds: Callable[[], float]
    forwards: int
    backwards: int
    resets: int
    images: Tensor | None


def iter_evaluate(
    adapter: Adapter,
    stream: Stream,
    device: torch.device,
    preprocess: Preprocess,
    totals: Totals | None = None,
    every: int | None = None,
) -> Iterator[tuple[list[Step], Totals]]:
    """Run `adapter` over `stream` and give out the figures of the batches, some at a time.

    The adapter is reset where the stream says so, and only predicts where it says not to adapt.
    Figures do not depend on how many batches are scored together.

    Args:
        adapter: A wrapped model on `device`.
        stream: From `tta.streams.build`.
        device: Where the model is.
        preprocess: Pixels (B, 3, H, W) in [0, 1] to what the model takes.
        totals: Of the batches before, to go on after them; `adapter` must be as it was then.
        every: Also stop after batches whose number is a multiple of this.

    Yields:
        What the batches since the last time gave, and the totals so far (one object, updated);
        the adapter is as the last of them left it.
    """
    totals = Totals(adapter.num_classes) if totals is None else totals
    memory, passes = PeakMemory(device), Passes(adapter.model)
    pending: list[_Predicted] = []
    begun, last = time.perf_counter(), totals.batches + len(stream.from_step(totals.batches)) - 1
    try:
        for predicted in _iter_predict(adapter, stream, device, preprocess, totals, passes):
            pending.append(predicted)
            done = predicted.batch.step + 1
            if done % MEMORY_EVERY == 0 or done > last:
                totals.peak_memory = max(totals.peak_memory, memory.read())
            full = len(pending) == MOST or time.perf_counter() - begun >= SECONDS
            if full or done > last or (every is not None and done % every == 0):
                yield _score(adapter, pending, totals), totals
                pending, begun = [], time.perf_counter()
    finally:
        passes.close()


def _iter_predict(
    adapter: Adapter,
    stream: Stream,
    device: torch.device,
    preprocess: Preprocess,
    totals: Totals,
    passes: Passes,
) -> Iterator[_Predicted]:
    """Adapt and predict batch by batch; waits for nothing that a GPU has not finished."""
    resets, own_resets = totals.resets, adapter.report.resets
    rest, domain = stream.from_step(totals.batches), None
    for batch in rest:
        if batch.reset and batch.step:  # before the first batch there is nothing to undo
            adapter.reset()
            resets, own_resets = resets + 1, adapter.report.resets
        pixels = batch.images if batch.window is None else batch.window
        passes.restart()
        output, seconds = _predict(adapter, rest, batch, preprocess(pixels.to(device)), passes)
        report = adapter.report
        resets += max(report.resets - own_resets, 0)
        own_resets = report.resets
        images = batch.images[:SAMPLES].clone() if batch.domain != domain else None
        domain = batch.domain
        yield _Predicted(
            replace(batch, images=batch.images[:0], window=None),
            output[-len(batch) :],
            report,
            seconds,
            passes.forward,
            passes.backward,
            resets,
            images,
        )


def _predict(
    adapter: Adapter, stream: Stream, batch: Batch, images: Tensor, passes: Passes
) -> tuple[Tensor, Callable[[], float]]:
    """The adapter's output (B, C) and what gives the seconds it took; tells a measured clock."""

    def adaptive() -> tuple[Tensor, Callable[[], float]]:
        stop = start_timer(images.device)
        with nullcontext() if batch.adapt else adapter.frozen():
            output = adapter(images)
        return output, stop()

    def plain() -> Tensor:
        with adapter.frozen(), torch.no_grad(), passes.uncounted():
            return adapter.model(images)

    if stream.stopwatch is None or not batch.adapt:
        return adaptive()
    return stream.stopwatch.run(adaptive, plain)


def _score(adapter: Adapter, pending: Sequence[_Predicted], totals: Totals) -> list[Step]:
    """Make the figures of some batches, and add them to the totals."""
    output = torch.cat([p.output for p in pending])
    labels = torch.cat([p.batch.labels for p in pending]).cpu()
    together = score(output.argmax(1).cpu(), log_probabilities(adapter, output), labels)
    steps, stop = [], 0
    for p in pending:
        batch, report = p.batch, p.report
        start, stop = stop, stop + len(batch)
        scores = together[start:stop]
        finite = scores.nll[scores.finite]
        row = {
            "step": batch.step,
            "domain": batch.domain,
            "severity": batch.severity,
            "images": len(batch),
            "errors": int(scores.wrong.sum()),
            "entropy": float(scores.entropy.mean()),
            "nll": float(finite.mean()) if len(finite) else math.nan,
            "concentration": scores.concentration,
            "loss": report.loss,
            "selected": int(report.selected) if report.stepped and batch.adapt else 0,
            "resets": p.resets,
            "late": batch.late,
            "seconds": p.seconds(),
        }
        totals.add(row, scores, batch.domains, batch.severities)
        totals.forwards += p.forwards
        totals.backwards += p.backwards
        steps.append(Step(row, scores, totals.error, p.images))
    return steps


def clean_error(
    adapter: Adapter,
    images: LabelledSet,
    batch_size: int,
    seed: int,
    device: torch.device,
    preprocess: Preprocess,
    readers: int = 0,
) -> float:
    """Share of errors on clean images with the adapter frozen, in a shuffled order.

    `readers` processes decode images ahead.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).tolist()
    loader = DataLoader(
        cast("Dataset[tuple[Tensor, int]]", images),
        batch_size,
        sampler=order,
        num_workers=readers,
        generator=generator,  # or else it draws from torch's own
    )
    wrong = 0
    with adapter.frozen():
        for pixels, labels in loader:
            output = adapter(preprocess(pixels.to(device).float() / 255)).cpu()
            wrong += int(((output.argmax(1) != labels) | output.isnan().any(1)).sum())
    return wrong / len(order)
