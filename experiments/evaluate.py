"""One method over one stream: predictions, errors, times, and what the adapter reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.data import LabelledSet
from tta import Adapter
from tta.streams import Stream

__all__ = ["Totals", "clean_error", "iter_evaluate"]

Preprocess = Callable[[Tensor], Tensor]


@dataclass
class Totals:
    """What adds up over a stream; `add` takes the rows of `iter_evaluate`."""

    images: int = 0
    errors: int = 0
    seconds: float = 0.0
    selected: int = 0
    resets: int = 0
    by_domain: dict[str, tuple[int, int]] = field(default_factory=dict)  # images, errors

    def add(self, row: dict[str, Any], wrong: Tensor, domains: Sequence[str]) -> None:
        """Count one batch.

        Args:
            row: The batch's figures.
            wrong: (B,) bool.
            domains: The domain of each image.
        """
        self.images += row["images"]
        self.errors += row["errors"]
        self.seconds += row["seconds"]
        self.selected += row["selected"]
        self.resets = row["resets"]
        for name, bad in zip(domains, wrong.tolist(), strict=True):
            images, errors = self.by_domain.get(name, (0, 0))
            self.by_domain[name] = images + 1, errors + bad

    def summary(self) -> dict[str, Any]:
        """The figures of the whole stream; errors are shares in [0, 1]."""
        by_domain = {name: errors / images for name, (images, errors) in self.by_domain.items()}
        shifted = [error for name, error in by_domain.items() if name != "clean"]
        return {
            "images": self.images,
            "error": self.errors / self.images,
            "mean_error": float(np.mean(shifted or list(by_domain.values()))),
            "domain_errors": by_domain,
            "images_per_second": self.images / max(self.seconds, 1e-9),
            "seconds": self.seconds,
            "selected": self.selected,
            "resets": self.resets,
        }


def iter_evaluate(
    adapter: Adapter, stream: Stream, device: torch.device, preprocess: Preprocess
) -> Iterator[tuple[dict[str, Any], Totals]]:
    """Run `adapter` over `stream` and give out the figures of every batch as it comes.

    The adapter is reset where the stream says so, and only predicts where it says not to adapt.

    Args:
        adapter: A wrapped model on `device`.
        stream: From `tta.streams.build`.
        device: Where the model is.
        preprocess: Pixels (B, 3, H, W) in [0, 1] to what the model takes.

    Yields:
        The batch's row for the results file, and the totals so far (one object, updated).
    """
    totals = Totals()
    resets, own_resets = 0, adapter.report.resets
    for batch in stream:
        if batch.reset and totals.images:  # before the first batch there is nothing to undo
            adapter.reset()
            resets, own_resets = resets + 1, adapter.report.resets
        pixels = batch.images if batch.window is None else batch.window
        images = preprocess(pixels.to(device))
        start = _now(device)
        with nullcontext() if batch.adapt else adapter.frozen():
            logits = adapter(images)[-len(batch) :]
        seconds = _now(device) - start
        report = adapter.report
        resets += max(report.resets - own_resets, 0)
        own_resets = report.resets
        wrong = (logits.argmax(1).cpu() != batch.labels.cpu()) | ~_finite(logits)
        row = {
            "step": batch.step,
            "domain": batch.domain,
            "severity": batch.severity,
            "images": len(wrong),
            "errors": int(wrong.sum()),
            "entropy": _mean_entropy(logits),
            "loss": report.loss,
            "selected": int(report.selected) if report.stepped and batch.adapt else 0,
            "resets": resets,
            "late": batch.late,
            "seconds": seconds,
        }
        totals.add(row, wrong, batch.domains)
        yield row, totals


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
            logits = adapter(preprocess(pixels))
            wrong += int(((logits.argmax(1).cpu() != labels) | ~_finite(logits)).sum())
    return wrong / len(order)


def _finite(logits: Tensor) -> Tensor:
    """(B,) bool: rows without NaN; -inf is a legal log-probability."""
    return ~logits.isnan().any(1).cpu()


def _mean_entropy(logits: Tensor) -> float:
    log_probs = F.log_softmax(logits.float(), 1)
    return float(-(log_probs.exp() * log_probs).nan_to_num(0.0).sum(1).mean())


def _now(device: torch.device) -> float:
    """The time once the device has finished what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
