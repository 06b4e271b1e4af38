"""What EATA, ETA and RDumb share: which samples they learn from, and the loss on these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, number
from tta.core.component import Context
from tta.core.config import UpdateConfig
from tta.core.prediction import Prediction, Report
from tta.core.update import Update
from tta.parts.losses import entropy
from tta.parts.selection import move_average, non_redundant

__all__ = ["Selection", "SelectiveConfig", "SelectiveUpdate", "select", "weighted_entropy"]


Measure: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class SelectiveConfig(UpdateConfig):
    """Fields of the two filters."""

    entropy_margin: float = 0.4  # E0 as a share of ln C, eq. 3
    redundancy_margin: float = 0.05  # d, largest cosine similarity with q, eq. 5

    def __post_init__(self) -> None:
        super().__post_init__()
        number("entropy_margin", self.entropy_margin, 0, LARGE, above=True)
        number("redundancy_margin", self.redundancy_margin, 0, LARGE, above=True)


@dataclass
class Selection:
    """The outcome of both filters on one batch."""

    reliable: Tensor  # 0-dimensional: how many passed the entropy filter
    chosen: Tensor  # (B,) bool: passed both
    probs: Tensor  # (B, C), without gradient

    @property
    def mean_probs(self) -> Tensor:
        """Mean prediction (C,) over the chosen samples; NaN when there are none."""
        return self.probs[self.chosen].mean(0)


def select(
    logits: Tensor,
    average: Tensor,
    margin: float,
    redundancy_margin: float,
    measure: Measure = entropy,
) -> Selection:
    """Reliable samples that differ enough from the average of earlier ones (EATA, eq. 3 and 5).

    Args:
        logits: (B, C).
        average: (C,), q; all NaN while there is none.
        margin: Largest entropy in nats, strict.
        redundancy_margin: Largest cosine similarity with the average, strict.
        measure: The entropy (B,) of logits in nats.
    """
    logits = logits.detach()
    probs = logits.float().softmax(1)
    reliable = measure(logits) < margin
    chosen = reliable & non_redundant(probs, average, redundancy_margin)
    return Selection(reliable.sum(), chosen, probs)


def weighted_entropy(logits: Tensor, margin: float, measure: Measure = entropy) -> Tensor:
    """Mean of exp(margin - H) H, with weights that carry no gradient (EATA, eq. 4 and 6).

    Args:
        logits: (N, C) of the selected samples; the mean is over these, not over the batch.
        margin: E0 in nats.
        measure: The entropy (N,) of logits in nats.
    """
    entropies = measure(logits)
    return (entropies * torch.exp(margin - entropies.detach())).mean()


class SelectiveUpdate(Update):
    """Weighted entropy of reliable, non-redundant samples, and a penalty if there is one."""

    ema_probs: Tensor  # (C,), q; NaN while undefined

    def __init__(self, config: SelectiveConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.register_buffer(
            "ema_probs", torch.full((context.num_classes,), float("nan"), dtype=torch.float32)
        )

    def undefined_as_nan(self) -> tuple[str, ...]:
        """There is no average before the first selected sample."""
        return ("ema_probs",)

    @property
    def measure(self) -> Measure:
        """The entropy of logits in filter, weight and loss."""
        return entropy

    def penalty(self) -> Tensor | None:
        """Return a scalar that is added to the loss, or None for nothing."""
        return None

    def adapt(self, x: Tensor) -> Prediction:
        """Predict, select, weigh, step; nothing moves when no sample is selected."""
        config, margin = self.config, self.config.entropy_margin * self.context.log_classes
        selection = self.selection_pass(x)
        limit = config.redundancy_margin
        found = select(selection.logits, self.ema_probs, margin, limit, self.measure)
        count = selection.keep(found.chosen)
        self.report = Report(reliable=found.reliable, selected=count, kept=found.chosen)
        self.report |= {"loss": float("nan"), "stepped": False}
        if count == 0:
            return selection.prediction
        move_average(self.ema_probs, found.mean_probs)
        loss = weighted_entropy(selection.kept_logits(), margin, self.measure)
        penalty = self.penalty()
        if penalty is not None:
            loss = loss + penalty
        self.report |= {"loss": loss.detach(), "stepped": self.step(loss)}
        return selection.prediction
