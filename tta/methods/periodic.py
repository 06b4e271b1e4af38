"""Periodic: back to the source model after every N batches, whatever the update.

After the paper of RDumb (Press, Schneider, Kuemmerer, Bethge, NeurIPS 2023, arXiv 2306.05401).

RDumb is ETA with a reset after every N batches; this guard does the same to any update, norm rule
and output rule. It bounds how far anything can drift, at the price of a new start after every
reset.

Every batch counts from which the adapter may learn. After batch N, 2N, ... all that moves goes back
to where ``reset`` would put it, but for the random generator and this guard's own counters. With
``eta`` the predictions are those of ``rdumb``, which does the same before batch N + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGEST, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.guard import LEARN, Batch, Guard, Verdict
from tta.core.registry import register
from tta.parts.estimates import ConfidenceEstimate

__all__ = ["Periodic", "PeriodicConfig"]


@dataclass(frozen=True, kw_only=True)
class PeriodicConfig(ComponentConfig):
    """Fields of ``periodic``."""

    every: int = 1000  # N, batches between resets

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("every", self.every, 1, LARGEST)


@register("periodic")
class Periodic(Guard):
    """A full reset every N batches."""

    Config = PeriodicConfig
    cost = 0.1
    clears = ("ema_probs",)  # RDumb undefines the class average, which EATA's own reset keeps

    def __init__(self, config: PeriodicConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.estimator = ConfidenceEstimate()

    def resets_after(self, batches: Tensor) -> Tensor:
        """As :meth:`judge`, in a graph."""
        return (batches + 1) % self.config.every == 0

    def judge(self, batch: Batch) -> Verdict:
        """Reset after every N-th batch."""
        if (batch.step + 1) % self.config.every:
            return LEARN
        return Verdict(action="reset", reason=f"{self.config.every} batches since the last reset")
