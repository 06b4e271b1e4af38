"""FOA's shift: features move back by the distance of their average from the source's mean.

Niu, Miao, Chen, Wu, Zhao: Test-Time Model Adaptation with Only Forward Passes, ICML 2024,
arXiv 2404.01650.

FOA searches prompt tokens of a vision transformer without gradients and, on top, shifts its last
class token towards the source. The shift works alone, on features of any model before a linear
layer, and costs no more than a forward pass.

    z_b = W (h_b + s) + bias,   then   s <- (1 - a) s + a (mu_S - mean_b h_b)

mu_S is the mean of the source's features. The first batch is not shifted; s starts as its own value
after it, and moves after the answer ever after, unlike NEO's. ``balanced=True`` (ours) replaces the
mean over the images of a batch by one over the C classes; with r = mu_S it is that of ``neo``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import boolean, fraction
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.prediction import Prediction
from tta.core.registry import register
from tta.core.source import SourceStatistics
from tta.methods._shift import ShiftRule

__all__ = ["FoaShift", "FoaShiftConfig"]


@dataclass(frozen=True, kw_only=True)
class FoaShiftConfig(ComponentConfig):
    """Fields of ``foa_shift``."""

    momentum: float = 0.1  # a, weight of the new batch
    balanced: bool = False  # every predicted class counts once (ours)

    def __post_init__(self) -> None:
        fraction("momentum", self.momentum)
        boolean("balanced", self.balanced)


@register("foa_shift")
class FoaShift(ShiftRule):
    """Features moved back to the source's mean by an average of earlier batches."""

    Config = FoaShiftConfig

    shift: Tensor  # (D,), s; NaN before the first batch

    def __init__(self, config: FoaShiftConfig, context: Context) -> None:
        super().__init__(config, context)
        self.register_buffer("shift", torch.full_like(self.feature_mean, float("nan")))

    def correct(self, prediction: Prediction) -> Tensor:
        """Logits (B, C) of the shifted features; the shift moves afterwards."""
        logits = self.shifted(prediction)
        if self.learning:
            self._move(prediction)
        return logits

    def offset(self) -> Tensor:
        """The shift, which is 0 before the first batch."""
        return self.shift.nan_to_num(0.0)

    def undefined_as_nan(self) -> tuple[str, ...]:
        """There is no shift before the first batch."""
        return ("shift",)

    def fit(self, source: SourceStatistics, network: Backbone) -> None:
        """Take or measure the source's mean.

        Raises:
            ValueError: When ``source`` has nothing to take it from, or that of another model.
        """
        self.fit_mean(source, network)

    def source_artefacts(self) -> dict[str, Any]:
        """The mean of the features."""
        return {"feature_mean": self.feature_mean}

    @torch.no_grad()
    def _move(self, prediction: Prediction) -> None:
        assert prediction.features is not None
        offsets, rate = prediction.features.float() - self.feature_mean, self.config.momentum
        if self.classes is not None:
            self.classes.move(offsets, prediction.logits.argmax(1), rate)
            self.shift.copy_(-self.classes.mean())
            return
        new = -offsets.mean(0)
        self.shift.copy_(torch.where(self.shift.isnan(), new, self.shift.lerp(new, rate)))
