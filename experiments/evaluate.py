"""One method over one stream: predictions, times, and what the adapter reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from experiments.cost import Passes, PeakMemory
from experiments.data import LabelledSet
from experiments.metrics import Scores, Totals, log_probabilities, score
from tta import Adapter
from tta.streams import Batch, Stream

__all__ = ["Step", "clean_error", "iter_evaluate"]

MEMORY_EVERY = 20  # batches; asking takes time, and a peak stays
Preprocess = Callable[[Tensor], Tensor]


class Step:
    """What one batch gave.

    Args:
        row: The batch's line in the results file.
        batch: From the stream.
        scores: Of each image.
    """

    def __init__(self, row: dict[str, Any], batch: Batch, scores: Scores) -> None:
        self.row = row
        self.batch = batch
        self.scores = scores


def iter_evaluate(
    adapter: Adapter,
    stream: Stream,
    device: torch.device,
    preprocess: Preprocess,
    totals: Totals | None = None,
) -> Iterator[tuple[Step, Totals]]:
    """Run `adapter` over `stream` and give out the figures of every batch as it comes.

    The adapter is reset where the stream says so, and only predicts where it says not to adapt.

    Args:
        adapter: A wrapped model on `device`.
        stream: From `tta.streams.build`.
        device: Where the model is.
        preprocess: Pixels (B, 3, H, W) in [0, 1] to what the model takes.
        totals: Of the batches before, to go on after them; `adapter` must be as it was then.

    Yields:
        What the batch gave, and the totals so far (one object, updated).
    """
    totals = Totals(adapter.num_classes) if totals is None else totals
    own_resets = adapter.report.resets
    memory, passes = PeakMemory(device), Passes(adapter.model)
    rest = stream.from_step(totals.batches)
    last = len(stream) - 1
    try:
        for batch in rest:
            resets = totals.resets
            if batch.reset and totals.images:  # before the first batch there is nothing to undo
                adapter.reset()
                resets, own_resets = resets + 1, adapter.report.resets
            pixels = batch.images if batch.window is None else batch.window
            passes.restart()
            output, seconds = _predict(adapter, rest, batch, preprocess(pixels.to(device)), passes)
            totals.forwards += passes.forward
            totals.backwards += passes.backward
            output = output[-len(batch) :]
            report = adapter.report
            resets += max(report.resets - own_resets, 0)
            own_resets = report.resets
            labels = batch.labels.cpu()
            scores = score(output.argmax(1).cpu(), log_probabilities(adapter, output), labels)
            row = {
                "step": batch.step,
                "domain": batch.domain,
                "severity": batch.severity,
                "images": len(labels),
                "errors": int(scores.wrong.sum()),
                "entropy": float(scores.entropy.mean()),
                "nll": float(scores.nll[scores.finite].mean()),
                "concentration": scores.concentration,
                "loss": report.loss,
                "selected": int(report.selected) if report.stepped and batch.adapt else 0,
                "resets": resets,
                "late": batch.late,
                "seconds": seconds,
            }
            totals.add(row, scores, batch.domains, batch.severities)
            if totals.batches % MEMORY_EVERY == 0 or batch.step == last:
                totals.peak_memory = max(totals.peak_memory, memory.read())
            yield Step(row, batch, scores), totals
    finally:
        passes.close()


def _predict(
    adapter: Adapter, stream: Stream, batch: Batch, images: Tensor, passes: Passes
) -> tuple[Tensor, float]:
    """The adapter's output (B, C) and the seconds it took; tells a measured clock what it costs."""

    def adaptive() -> tuple[Tensor, float]:
        start = _now(images.device)
        with nullcontext() if batch.adapt else adapter.frozen():
            output = adapter(images)
        return output, _now(images.device) - start

    def plain() -> Tensor:
        with adapter.frozen(), torch.no_grad(), passes.uncounted():
            return adapter.model(images)

    if stream.stopwatch is None or not batch.adapt:
        return adaptive()
    return stream.stopwatch.run(adaptive, plain)


def clean_error(
    adapter: Adapter,
    images: LabelledSet,
    batch_size: int,
    seed: int,
    device: torch.device,
    preprocess: Preprocess,
) -> float:
    """Share of errors on clean images with the adapter frozen, in a shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).tolist()
    wrong = 0
    with adapter.frozen():
        for start in range(0, len(order), batch_size):
            items = [images[i] for i in order[start : start + batch_size]]
            pixels = torch.stack([picture for picture, _ in items]).to(device).float() / 255
            labels = torch.tensor([label for _, label in items])
            output = adapter(preprocess(pixels)).cpu()
            wrong += int(((output.argmax(1) != labels) | output.isnan().any(1)).sum())
    return wrong / len(order)


def _now(device: torch.device) -> float:
    """The time once the device has finished what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
