"""What is measured of each image: one table, from which sums, means and result lines follow.

A metric is one entry of `METRICS`: a name, a function that gives one number per image, and words.
Sums by domain, means in batches and in the whole stream, keys of the results file, the treatment of
images without a prediction and the state in a snapshot all follow from the table. What is not a
mean over images (calibration, concentration) is in `experiments.run.totals` and here in `Scores`:

* concentration: negative entropy of the softmax of a batch's mean log-probabilities, in
  [-ln C, 0]. It is near 0 when a batch is predicted to be one class, as in a collapse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "METRICS",
    "SMALLEST",
    "Metric",
    "Predictions",
    "Scores",
    "score",
]

SMALLEST = 1e-12  # a probability of 0 for the label would make a mean infinite

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Predictions:
    """Predictions of some images, as metrics see them.

    Args:
        predicted: (B,) int64 class numbers.
        labels: (B,) int64 class numbers.
        probs: (B, C) float32 probabilities; rows without a prediction are 0.
        log_probs: (B, C) float32 natural logarithms of `probs`, none below that of `SMALLEST`;
            rows without a prediction are 0.
    """

    predicted: NDArray[np.int64]
    labels: NDArray[np.int64]
    probs: NDArray[np.float32]
    log_probs: NDArray[np.float32]

    @property
    def of_label(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The index of each image's label in a (B, C) array."""
        return np.arange(len(self.labels)), self.labels


@dataclass(frozen=True)
class Metric:
    """One number of each image, whose means are written to the results file.

    Args:
        name: Its key in the results file.
        function: Gives the (B,) numbers or booleans of B images.
        words: What it is, in a phrase for people.
        missing: What an image without a prediction (one whose output is not finite) counts as;
            None leaves such images out of the means.
        lines: The kinds of lines in the results file that hold its mean, among "batch", "domain"
            and "summary".
    """

    name: str
    function: Callable[[Predictions], NDArray[Any]]
    words: str
    missing: float | None = None
    lines: tuple[str, ...] = ("batch", "domain", "summary")

    def mean(self, total: float, images: int, scored: int) -> float:
        """The mean of a sum over some images; NaN where no image counts.

        Args:
            total: Sum over the images.
            images: Number of images.
            scored: Number of those with a prediction.
        """
        count = scored if self.missing is None else images
        return total / count if count else math.nan


def _brier(p: Predictions) -> Floats:
    return np.square(p.probs).sum(1) - 2 * p.probs[p.of_label] + 1


#: The metrics by name. "error" and "confidence" are also what calibration is measured from.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "error",
            lambda p: p.predicted != p.labels,
            "share of images whose prediction is not the label, or is not finite",
            missing=1.0,
            lines=("summary",),  # batch and domain lines hold the count, as "errors"
        ),
        Metric(
            "nll",
            lambda p: -p.log_probs[p.of_label],
            f"negative log-likelihood -ln p(label) in nats, p no smaller than {SMALLEST:g}",
        ),
        Metric(
            "brier",
            _brier,
            "Brier score, sum over classes of (p - [class is the label])^2, in [0, 2] (Brier 1950)",
            lines=("domain", "summary"),
        ),
        Metric(
            "entropy",
            lambda p: -(p.probs * p.log_probs).sum(1),
            "entropy of the predicted probabilities in nats",
            missing=0.0,
            lines=("batch",),
        ),
        Metric(
            "confidence", lambda p: p.probs.max(1), "probability of the predicted class", lines=()
        ),
    )
}


@dataclass
class Scores:
    """The numbers of each image of one batch or of several.

    Args:
        values: (B,) numbers of each metric, by name. Images without a prediction have the metric's
            `missing`, or 0 where that is None.
        finite: (B,) bool: images with a prediction.
        log_probs: (B, C), see `Predictions`.
    """

    values: dict[str, NDArray[Any]]
    finite: NDArray[np.bool_]
    log_probs: NDArray[np.float32]

    def rows(self, rows: slice | NDArray[Any]) -> Scores:
        """The numbers of some images."""
        values = {name: value[rows] for name, value in self.values.items()}
        return Scores(values, self.finite[rows], self.log_probs[rows])

    def means(self, line: str) -> dict[str, float]:
        """The means of the metrics that a kind of line holds; NaN where no image counts."""
        found: dict[str, float] = {}
        for metric in METRICS.values():
            if line in metric.lines:
                values = self.values[metric.name]
                counted = values[self.finite] if metric.missing is None else values
                found[metric.name] = float(counted.mean()) if len(counted) else math.nan
        return found

    @property
    def concentration(self) -> float:
        """Concentration of the predictions of all images together, in [-ln C, 0]."""
        logs = self.log_probs if self.finite.all() else self.log_probs[self.finite]
        mean = logs.mean(0) if len(logs) else np.zeros(1, np.float32)
        mean = mean - np.log(np.exp(mean - mean.max()).sum()) - mean.max()
        return float((np.exp(mean) * mean).sum())


def score(predicted: Tensor, log_probs: Tensor, labels: Tensor) -> Scores:
    """Score the images of one batch or of several; no image changes the numbers of another one.

    Args:
        predicted: (B,) class numbers.
        log_probs: (B, C), -inf allowed, NaN for rows without a prediction.
        labels: (B,) int64.

    Raises:
        ValueError: A metric gave something else than one number per image.
    """
    # numpy's operations on such small arrays take a third of the time of torch's.
    logs = log_probs.numpy()
    finite = np.asarray(~np.isnan(logs).any(1))
    clipped, probs = np.maximum(logs, np.float32(math.log(SMALLEST))), np.exp(logs)
    clipped[~finite], probs[~finite] = 0, 0
    predictions = Predictions(predicted.numpy(), labels.numpy(), probs, clipped)
    values = {}
    for metric in METRICS.values():
        found = metric.function(predictions)
        if np.shape(found) != (len(finite),):
            raise ValueError(
                f"`{metric.name}` must give one number per image, an array of shape "
                f"({len(finite)},), got shape {np.shape(found)}: change its function in METRICS"
            )
        if not finite.all():
            found = found.copy()
            found[~finite] = metric.missing or 0
        values[metric.name] = found
    return Scores(values, finite, clipped)
