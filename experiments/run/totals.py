"""What adds up over a stream, batch by batch; it can be written down and taken up again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.run.metrics import METRICS, Scores
from experiments.run.utilities import Utilities
from tta.streams.sources import CLEAN

__all__ = ["BINS", "Calibration", "Tally", "Totals"]

BINS = 15


@dataclass
class Tally:
    """What adds up over the images of one domain, or of all.

    Args:
        images: Number of images.
        errors: Number of these that are predicted wrongly or have no prediction.
        scored: Number of these that have a finite prediction.
        sums: Sum of each metric over the images, by name.
        severities: (images, errors) of each severity, as text; empty where two are combined.
    """

    images: int = 0
    errors: int = 0
    scored: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(METRICS, 0.0))
    severities: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Scores, severity: Any = None) -> Tally:
        """Count images that were shown at `severity`."""
        images, errors = len(scores.finite), int(np.count_nonzero(scores.values["error"]))
        single = isinstance(severity, (int, float))
        return cls(
            images=images,
            errors=errors,
            scored=int(np.count_nonzero(scores.finite)),
            sums={name: float(v.sum(dtype=np.float64)) for name, v in scores.values.items()},
            severities={f"{severity:g}": [images, errors]} if single else {},
        )

    def add(self, other: Tally) -> None:
        """Count the images of another tally too."""
        self.images += other.images
        self.errors += other.errors
        self.scored += other.scored
        for name, value in other.sums.items():
            self.sums[name] += value
        for level, counts in other.severities.items():
            held = self.severities.setdefault(level, [0, 0])
            held[:] = [have + more for have, more in zip(held, counts, strict=True)]

    def means(self, line: str) -> dict[str, float]:
        """The means of the metrics that a kind of line holds; NaN where no image counts."""
        return {
            name: metric.mean(self.sums[name], self.images, self.scored)
            for name, metric in METRICS.items()
            if line in metric.lines
        }

    def figures(self) -> dict[str, Any]:
        """Counts and means of one domain as JSON types."""
        return {
            "images": self.images,
            "errors": self.errors,
            **self.means("domain"),
            "severities": {level: list(counts) for level, counts in self.severities.items()},
        }


@dataclass
class Calibration:
    """How far confidences are from accuracies, over all images with a finite prediction.

    Args:
        confidences: Probability of each prediction, (B,) float of each batch.
        right: Whether the prediction is the label, (B,) bool of each batch.
    """

    confidences: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)

    def add(self, scores: Scores) -> None:
        """Add the images of one batch."""
        right = ~scores.values["error"][scores.finite]
        self.confidences.append(torch.from_numpy(scores.values["confidence"][scores.finite]))
        self.right.append(torch.from_numpy(right))

    def tensors(self) -> dict[str, Tensor]:
        """Confidences and hits of all images, (N,) each."""
        return {"confidences": torch.cat(self.confidences), "right": torch.cat(self.right)}

    def reliability(self) -> list[list[float]]:
        """[images, mean confidence, accuracy] of each bin of confidence, NaN for empty ones."""
        confidences, right = torch.cat(self.confidences), torch.cat(self.right)
        which = (confidences * BINS).ceil().long().clamp(1, BINS) - 1  # bins are open on the left
        counts = torch.bincount(which, minlength=BINS).double()
        sums = [torch.bincount(which, v.double(), BINS) / counts for v in (confidences, right)]
        return torch.stack([counts, *sums], 1).tolist()

    def error(self) -> float:
        """Expected calibration error in [0, 1].

        It is the mean gap between confidence and accuracy over `BINS` bins of equal width (Guo et
        al. 2017, arXiv 1706.04599). torchmetrics gives a confidence of exactly 1, which softmax in
        float32 reaches, a bin of its own beyond these; here it is in the last.
        """
        filled = [row for row in self.reliability() if row[0]]
        images = sum(count for count, _, _ in filled)
        return sum(count * abs(mean - right) for count, mean, right in filled) / images


@dataclass
class Totals:
    """What adds up over a stream.

    Args:
        classes: Number of classes.
        batches: Batches seen; the stream goes on at this step.
        everything: All images.
        by_domain: The images of each domain, in the order in which the domains first came.
        by_recurrence: [errors, images] of each showing of all domains, where they come again; a
            batch counts where its first image does.
        pairs: Whether two corruptions are shown at once, as on a walk.
        seconds: Time of the adapter alone.
        selected: Samples in a loss.
        resets: Resets by the scenario or by the method itself.
        late: Images that came while the method was busy, see `tta.streams.Clock`.
        forwards: Images through the model; an image counts each time that it goes through.
        backwards: Images through the model's backward pass, counted likewise.
        concentration: Sum over batches.
        peak_memory: Bytes.
        clean_before: Error on clean images before the stream; None where there are none.
        utilities: Figures in which time counts, of streams with a clock.
        calibration: Confidences of all predictions.
    """

    classes: int
    batches: int = 0
    everything: Tally = field(default_factory=Tally)
    by_domain: dict[str, Tally] = field(default_factory=dict)
    by_recurrence: list[list[int]] = field(default_factory=list)
    pairs: bool = False
    seconds: float = 0.0
    selected: int = 0
    resets: int = 0
    late: int = 0
    forwards: int = 0
    backwards: int = 0
    concentration: float = 0.0
    peak_memory: int = 0
    clean_before: float | None = None
    utilities: Utilities = field(default_factory=Utilities)
    calibration: Calibration = field(default_factory=Calibration)

    @property
    def images(self) -> int:
        """Images seen."""
        return self.everything.images

    @property
    def error(self) -> float:
        """Share of errors so far."""
        return self.everything.errors / self.images

    def add(
        self,
        row: dict[str, Any],
        scores: Scores,
        domains: Sequence[str],
        severities: Sequence[Any],
    ) -> None:
        """Count one batch.

        Args:
            row: The batch's figures, see `experiments.run.scoring.iter_evaluate`.
            scores: The numbers of its images.
            domains: The domain of each image.
            severities: The severity of each image.
        """
        self.batches += 1
        self.seconds += row["seconds"]
        self.selected += row["selected"]
        self.resets = row["resets"]
        self.late += row["images"] if row["late"] else 0
        self.concentration += row["concentration"]
        if "recurrence" in row:
            while len(self.by_recurrence) <= row["recurrence"]:
                self.by_recurrence.append([0, 0])
            held = self.by_recurrence[row["recurrence"]]
            held[:] = held[0] + row["errors"], held[1] + row["images"]
        self.pairs = self.pairs or any(isinstance(severity, tuple) for severity in severities)
        for (name, severity), rows in _rows_by(domains, severities).items():
            tally = Tally.of(scores if rows is None else scores.rows(rows), severity)
            self.by_domain.setdefault(name, Tally()).add(tally)
            self.everything.add(tally)
        self.calibration.add(scores)

    def summary(self) -> dict[str, Any]:
        """The figures of the whole stream; errors are shares in [0, 1]."""
        errors = {name: tally.errors / tally.images for name, tally in self.by_domain.items()}
        shifted = {name: error for name, error in errors.items() if name != CLEAN} or errors
        worst = max(shifted, key=lambda name: shifted[name])
        # A walk passes its pairs at different lengths, and its figure is that of the whole stream.
        mean = self.error if self.pairs else float(np.mean(list(shifted.values())))
        again = [wrong / images for wrong, images in self.by_recurrence if images]
        scored = self.everything.scored
        return {
            "images": self.images,
            **self.everything.means("summary"),
            "mean_error": mean,
            "worst_error": shifted[worst],
            "worst_domain": worst,
            "domain_errors": errors,
            **({"recurrence_errors": again} if len(again) > 1 else {}),
            "ece": self.calibration.error() if scored else math.nan,
            "reliability": self.calibration.reliability() if scored else [],
            "concentration": self.concentration / self.batches,
            "images_per_second": self.images / max(self.seconds, 1e-9),
            "seconds": self.seconds,
            "selected": self.selected,
            "used": self.selected / self.images,
            "resets": self.resets,
            "late": self.late,
            "forwards": self.forwards / self.images,
            "backwards": self.backwards / self.images,
            "peak_memory": self.peak_memory,
            "clean_error_before": self.clean_before,
            **self.utilities.summary(),
        }

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything, as JSON types and as tensors; see `from_state`."""
        numbers = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del numbers["calibration"]
        numbers["everything"] = vars(self.everything)
        numbers["utilities"] = vars(self.utilities)
        numbers["by_domain"] = {name: vars(tally) for name, tally in self.by_domain.items()}
        numbers["metrics"] = list(METRICS)
        return numbers, self.calibration.tensors()

    @classmethod
    def from_state(cls, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> Totals:
        """Totals that go on where `state` was taken.

        Raises:
            ValueError: The state holds sums of other metrics than those of now, or lacks figures.
        """
        numbers = dict(numbers)
        metrics = numbers.pop("metrics", None)
        if metrics != list(METRICS):
            raise ValueError(
                f"`totals` must hold sums of the metrics {', '.join(METRICS)}, got "
                + (", ".join(metrics) if metrics else "those of an earlier version")
            )
        if missing := cls.__dataclass_fields__.keys() - numbers.keys() - {"calibration"}:
            raise ValueError(
                f"`totals` must hold all figures, got none of {', '.join(sorted(missing))}: they "
                "are those of an earlier version"
            )
        numbers["everything"] = Tally(**numbers["everything"])
        numbers["utilities"] = Utilities(**numbers["utilities"])
        numbers["by_domain"] = {name: Tally(**v) for name, v in numbers["by_domain"].items()}
        calibration = Calibration([tensors["confidences"]], [tensors["right"]])
        return cls(**numbers, calibration=calibration)


def _rows_by(
    domains: Sequence[str], severities: Sequence[Any]
) -> dict[tuple[str, Any], np.ndarray | None]:
    """Rows of each (domain, severity) of a batch; None for all rows, where there is only one."""
    keys = list(zip(domains, severities, strict=True))
    if keys.count(keys[0]) == len(keys):
        return {keys[0]: None}
    rows: dict[tuple[str, Any], list[int]] = {}
    for i, key in enumerate(keys):
        rows.setdefault(key, []).append(i)
    return {key: np.array(found) for key, found in rows.items()}
