"""Watch: health figures and an estimate of accuracy, without ever acting on them.

The guard behind ``wrap(..., health=True)`` and ``shadow=True``. Whether a deployed model still
works can be asked without labels: where predictions disagree under dropout, they are often wrong
(AETTA: Lee, Chottananurak, Gong, Lee, CVPR 2024, arXiv 2404.01351).

Everything is learned and answered as without a guard. ``adapter.health`` holds the figures of the
last batch and their moving averages; on one batch in twenty the source model predicts too, for the
agreement with it, which is 5 % more forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.guard import LEARN, Batch, Guard, Verdict
from tta.core.registry import register
from tta.parts.estimates import ConfidenceEstimate

__all__ = ["Watch", "WatchConfig"]


@dataclass(frozen=True, kw_only=True)
class WatchConfig(ComponentConfig):
    """Fields of ``watch``."""


@register("watch")
class Watch(Guard):
    """Measures and does nothing."""

    Config = WatchConfig
    cost = 0.1

    def __init__(self, config: WatchConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.estimator = ConfidenceEstimate()

    def resets_after(self, batches: Tensor) -> Tensor:
        """Never."""
        return batches < 0

    def judge(self, batch: Batch) -> Verdict:
        """Let everything pass."""
        return LEARN
