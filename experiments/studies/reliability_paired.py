"""Methods on the same images: errors, differences image by image, estimates against the truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.records.health import estimates
from experiments.run.subject import Subject
from tta import Adapter
from tta.streams import Batch
from tta.streams.sources import CLEAN

__all__ = ["Played", "estimates", "paired", "play", "recovery"]

BACK = 10  # batches that must be at the level again
Wrong = NDArray[np.bool_]


@dataclass
class Played:
    """What an adapter did on a stream.

    Args:
        wrong: Of each batch, (B,) whether each image's prediction is wrong.
        domains: Of each image, its domain.
        pairs: Whether two corruptions are shown at once, as on a walk.
        actions: How often a guard did what; empty without health figures.
        estimated: Of each batch with an estimate of accuracy: the estimator, the estimate, images
            and errors.
    """

    wrong: list[Wrong] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    pairs: bool = False
    actions: Counter[str] = field(default_factory=Counter)
    estimated: list[tuple[str, float, int, int]] = field(default_factory=list)

    @property
    def all_wrong(self) -> Wrong:
        """(N,) of the whole stream."""
        return np.concatenate(self.wrong)

    def mean_error(self) -> float:
        """The record's figure: the mean over shifted domains if there are any; a walk's error."""
        if self.pairs:
            return float(self.all_wrong.mean())
        names, places = np.unique(np.array(self.domains), return_inverse=True)
        errors = np.bincount(places, self.all_wrong) / np.bincount(places)
        shifted = errors[names != CLEAN]
        return float((shifted if len(shifted) else errors).mean())


def play(adapter: Adapter, batches: Iterable[Batch], subject: Subject) -> Played:
    """Adapt to batches and score the predictions.

    Args:
        adapter: A wrapped model. It is reset where a batch says so, but for the first.
        batches: Rows with a label below 0 are shown and not scored.
        subject: Says how pixels become what the model takes, and where.
    """
    played = Played()
    for batch in batches:
        if batch.reset and batch.step > 0:
            adapter.reset()
        with nullcontext() if batch.adapt else adapter.frozen():
            output = adapter(subject.preprocess(batch.images.to(subject.device)))
        output, labels = output.detach().float().cpu(), batch.labels.cpu()
        wrong = (output.argmax(1) != labels) | output.isnan().any(1)
        scored = labels >= 0
        wrong = wrong[scored].numpy()
        played.wrong.append(wrong)
        played.pairs = played.pairs or any(isinstance(s, tuple) for s in batch.severities)
        played.domains += [d for d, s in zip(batch.domains, scored.tolist(), strict=True) if s]
        health = adapter.health
        if health:
            played.actions[str(health["action"])] += 1
            estimate = float(health["estimated_accuracy"])
            if np.isfinite(estimate) and len(wrong):
                found = str(health["estimator"]), estimate, len(wrong), int(wrong.sum())
                played.estimated.append(found)
    return played


def paired(
    wrong: Wrong, source: Wrong, partner: Wrong | None, places: NDArray[np.int64]
) -> dict[str, list[Any]]:
    """Errors of the parts of a stream, and standard errors of differences, paired by image.

    Args:
        wrong: (N,) whether a method's predictions are wrong.
        source: (N,) of the model without adaptation, on the same images in the same order.
        partner: (N,) of the method without its guard; None for none.
        places: (N,) the part that each image belongs to, from 0.

    Returns:
        For each part: ``images``, ``errors``, ``source``, ``se`` (of the share of errors less that
        of source) and ``partner``, ``partner_se``, which are None without a partner.
    """
    found: dict[str, list[Any]] = {
        name: [] for name in ("images", "errors", "source", "se", "partner", "partner_se")
    }
    for place in range(int(places.max()) + 1):
        rows = places == place
        mine, base = wrong[rows], source[rows]
        found["images"].append(int(rows.sum()))
        found["errors"].append(int(mine.sum()))
        found["source"].append(int(base.sum()))
        found["se"].append(_standard_error(mine, base))
        other = None if partner is None else partner[rows]
        found["partner"].append(None if other is None else int(other.sum()))
        found["partner_se"].append(None if other is None else _standard_error(mine, other))
    return found


def _standard_error(mine: Wrong, other: Wrong) -> float:
    """Of the mean of the differences, image by image; 0 for a single image."""
    gaps = mine.astype(float) - other.astype(float)
    return float(gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else 0.0


def recovery(disturbed: list[Wrong], calm: list[Wrong], back: int = BACK) -> int | None:
    """Batches until a method is at its level again.

    That is where `back` batches together are no more above those of the method that was not
    disturbed than twice the standard error of the difference.

    Args:
        disturbed: Of each batch, whether predictions are wrong.
        calm: Of the same batches, from the same state, without what was in between.
        back: Batches taken together; fewer at the end.

    Returns:
        The number of batches before these; None if there are none such.
    """
    for first in range(len(disturbed)):
        mine = np.concatenate(disturbed[first : first + back])
        other = np.concatenate(calm[first : first + back])
        gap = mine.mean() - other.mean()
        if gap <= 2 * _standard_error(mine, other):
            return first
    return None
