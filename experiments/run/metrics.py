"""What is measured of a stream: errors, and how good the probabilities behind them are.

Everything adds up batch by batch in `Totals`, which can be written down and taken up again.

* error: a prediction that is not the label, or not a number.
* negative log-likelihood: -ln p(label), with p no smaller than `SMALLEST`.
* Brier score: sum over classes of (p - [class is the label])^2, in [0, 2] (Brier 1950).
* expected calibration error: mean gap between confidence and accuracy over `BINS` equal bins of
  confidence (Guo et al. 2017, arXiv 1706.04599), by torchmetrics.
* concentration: negative entropy of the softmax of a batch's mean log-probabilities, in
  [-ln C, 0]: near 0 when a batch is predicted to be one class, as in a collapse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import tta

__all__ = ["BINS", "SMALLEST", "Scores", "Tally", "Totals", "log_probabilities", "score"]

BINS = 15
SMALLEST = 1e-12  # a probability of 0 for the label would make a mean infinite


def log_probabilities(adapter: tta.Adapter, output: Tensor) -> Tensor:
    """Log-probabilities (B, C) float32 on the CPU that an adapter's output stands for.

    Logits and LAME's log-assignments are normalised by `log_softmax`, and so are AdaNPC's scores,
    which do not sum to 1 by themselves. RMT returns the sum of two models' logits, whose mean is
    what can be read as logits.

    Args:
        adapter: What made the output.
        output: (B, C).
    """
    update, last = adapter.config.update, adapter.config.output
    summed = last is None and getattr(update, "combine", None) == "sum"
    return F.log_softmax(output.float() / (2 if summed else 1), 1).cpu()


@dataclass
class Scores:
    """Figures of each image of one batch or of several.

    Args:
        wrong: (B,) bool.
        finite: (B,) bool: rows that are numbers; the others count as errors and nothing else.
        nll: (B,) negative log-likelihood in nats, 0 where not finite.
        brier: (B,) in [0, 2], 0 where not finite.
        entropy: (B,) in nats, 0 where not finite.
        confidence: (B,) probability of the most probable class, 0 where not finite.
        log_probs: (B, C), none below that of `SMALLEST`.
    """

    wrong: np.ndarray
    finite: np.ndarray
    nll: np.ndarray
    brier: np.ndarray
    entropy: np.ndarray
    confidence: np.ndarray
    log_probs: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> Scores:
        """The figures of some images."""
        return Scores(*(value[rows] for value in vars(self).values()))

    @property
    def concentration(self) -> float:
        """Of all images together."""
        logs = self.log_probs if self.finite.all() else self.log_probs[self.finite]
        mean = logs.mean(0) if len(logs) else np.zeros(1, np.float32)
        mean = mean - np.log(np.exp(mean - mean.max()).sum()) - mean.max()
        return float((np.exp(mean) * mean).sum())


def score(predicted: Tensor, log_probs: Tensor, labels: Tensor) -> Scores:
    """Score the images of one batch or of several; no image changes what another one gets.

    Args:
        predicted: (B,) class numbers.
        log_probs: (B, C), -inf allowed, NaN for rows without a prediction.
        labels: (B,) int64.
    """
    # numpy's operations on such small arrays take a third of the time of torch's.
    logs, label = log_probs.numpy(), (np.arange(len(labels)), labels.numpy())
    finite = ~np.isnan(logs).any(1)
    clipped, probs = np.maximum(logs, np.float32(math.log(SMALLEST))), np.exp(logs)
    brier = np.square(probs).sum(1) - 2 * probs[label] + 1
    if not finite.all():
        clipped[~finite], probs[~finite], brier[~finite] = 0, 0, 0
    return Scores(
        wrong=(predicted.numpy() != label[1]) | ~finite,
        finite=finite,
        nll=-clipped[label],
        brier=brier,
        entropy=-(probs * clipped).sum(1),
        confidence=probs.max(1),
        log_probs=clipped,
    )


@dataclass
class Tally:
    """What adds up over the images of one domain, or of all.

    Args:
        images: Number of images.
        errors: Of these, predicted wrongly.
        scored: Of these, with a finite prediction.
        nll: Sum of negative log-likelihoods.
        brier: Sum of Brier scores.
        severities: (images, errors) of each severity, as text; none where two are combined.
    """

    images: int = 0
    errors: int = 0
    scored: int = 0
    nll: float = 0.0
    brier: float = 0.0
    severities: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Scores, severity: Any = None) -> Tally:
        """Count images shown at `severity`."""
        images, errors = len(scores.wrong), int(np.count_nonzero(scores.wrong))
        single = isinstance(severity, (int, float))
        return cls(
            images=images,
            errors=errors,
            scored=int(np.count_nonzero(scores.finite)),
            nll=float(scores.nll.sum(dtype=np.float64)),
            brier=float(scores.brier.sum(dtype=np.float64)),
            severities={f"{severity:g}": [images, errors]} if single else {},
        )

    def add(self, other: Tally) -> None:
        """Count the images of another tally too."""
        self.images += other.images
        self.errors += other.errors
        self.scored += other.scored
        self.nll += other.nll
        self.brier += other.brier
        for level, counts in other.severities.items():
            held = self.severities.setdefault(level, [0, 0])
            held[:] = [have + more for have, more in zip(held, counts, strict=True)]

    def figures(self) -> dict[str, Any]:
        """Counts and means as JSON types."""
        return {
            "images": self.images,
            "errors": self.errors,
            "nll": self.nll / self.scored if self.scored else math.nan,
            "brier": self.brier / self.scored if self.scored else math.nan,
            "severities": {level: list(counts) for level, counts in self.severities.items()},
        }


@dataclass
class Totals:
    """What adds up over a stream.

    Args:
        classes: Number of classes.
        batches: Batches seen; the stream goes on at this step.
        everything: All images.
        by_domain: The images of each domain, in the order of their first one.
        seconds: Time of the adapter alone.
        selected: Samples in a loss.
        resets: Resets by the scenario or by the method itself.
        late: Images that came while the method was busy, see `tta.streams.Clock`.
        forwards: Images through the model, counting each time.
        backwards: Images through the model's backward.
        concentration: Sum over batches.
        peak_memory: Bytes.
        clean_before: Error on clean images before the stream, if there are any.
        confidences: Probability of each prediction, (B,) float of each batch.
        right: Whether it was right, (B,) bool of each batch.
    """

    classes: int
    batches: int = 0
    everything: Tally = field(default_factory=Tally)
    by_domain: dict[str, Tally] = field(default_factory=dict)
    seconds: float = 0.0
    selected: int = 0
    resets: int = 0
    late: int = 0
    forwards: int = 0
    backwards: int = 0
    concentration: float = 0.0
    peak_memory: int = 0
    clean_before: float | None = None
    confidences: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)

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
            scores: Of its images.
            domains: The domain of each image.
            severities: The severity of each image.
        """
        self.batches += 1
        self.seconds += row["seconds"]
        self.selected += row["selected"]
        self.resets = row["resets"]
        self.late += row["images"] if row["late"] else 0
        self.concentration += row["concentration"]
        keys = list(zip(domains, severities, strict=True))
        if keys.count(keys[0]) == len(keys):
            groups = {keys[0]: Tally.of(scores, severities[0])}
        else:
            rows: dict[tuple[str, Any], list[int]] = {}
            for i, key in enumerate(keys):
                rows.setdefault(key, []).append(i)
            groups = {key: Tally.of(scores[np.array(i)], key[1]) for key, i in rows.items()}
        for (name, _), tally in groups.items():
            self.by_domain.setdefault(name, Tally()).add(tally)
            self.everything.add(tally)
        self.confidences.append(torch.from_numpy(scores.confidence[scores.finite]))
        self.right.append(torch.from_numpy(~scores.wrong[scores.finite]))

    def reliability(self) -> list[list[float]]:
        """[images, mean confidence, accuracy] of each bin of confidence, NaN for empty ones."""
        confidences, right = torch.cat(self.confidences), torch.cat(self.right)
        which = (confidences * BINS).ceil().long().clamp(1, BINS) - 1  # bins are open on the left
        counts = torch.bincount(which, minlength=BINS).double()
        sums = [torch.bincount(which, v.double(), BINS) / counts for v in (confidences, right)]
        return torch.stack([counts, *sums], 1).tolist()

    def calibration_error(self) -> float:
        """Expected calibration error in [0, 1]."""
        from torchmetrics.functional.classification import binary_calibration_error  # slow

        confidences, right = torch.cat(self.confidences), torch.cat(self.right)
        return float(binary_calibration_error(confidences, right, n_bins=BINS))

    def summary(self) -> dict[str, Any]:
        """The figures of the whole stream; errors are shares in [0, 1]."""
        errors = {name: tally.errors / tally.images for name, tally in self.by_domain.items()}
        shifted = {name: error for name, error in errors.items() if name != "clean"} or errors
        worst = max(shifted, key=lambda name: shifted[name])
        pooled = self.everything.figures()
        scored = self.everything.scored
        return {
            "images": self.images,
            "error": self.error,
            "mean_error": float(np.mean(list(shifted.values()))),
            "worst_error": shifted[worst],
            "worst_domain": worst,
            "domain_errors": errors,
            "nll": pooled["nll"],
            "brier": pooled["brier"],
            "ece": self.calibration_error() if scored else math.nan,
            "reliability": self.reliability() if scored else [],
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
        }

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything, as JSON types and as tensors; see `from_state`."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["everything"] = vars(self.everything)
        plain["by_domain"] = {name: vars(tally) for name, tally in self.by_domain.items()}
        tensors = {name: torch.cat(plain.pop(name)) for name in ("confidences", "right")}
        return plain, tensors

    @classmethod
    def from_state(cls, plain: dict[str, Any], tensors: dict[str, Tensor]) -> Totals:
        """Totals that go on where `state` was taken."""
        tallies = {name: Tally(**values) for name, values in plain["by_domain"].items()}
        everything = Tally(**plain["everything"])
        return cls(
            **{**plain, "everything": everything, "by_domain": tallies},
            confidences=[tensors["confidences"]],
            right=[tensors["right"]],
        )
