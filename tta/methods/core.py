"""Core: less correlation between classes, on top of alpha-BN. Experimental.

You, Li, Zhao: Test-time Batch Statistics Calibration for Covariate Shift, 2021, arXiv 2110.04065.
No official code was found, and the paper's text was not at hand: this is a reading of its abstract
and not a reproduction. There is no trace to compare with.

It is known that the loss is built from the pairwise correlation between classes in the predictions
of a batch, and that it is minimised online on top of alpha-BN, the paper's other half
(``norm="alpha_bn"``, the default norm rule here). It is not known how the correlation is
normalised, which parameters are trained with which optimiser and rate, whether gradients flow
through alpha-BN's statistics (here they do), and what alpha is for each task.

    R = P^T P / B,   L = sum_{i != j} R_ij = 1 - mean_b |p_b|^2,   P (B, C) the probabilities

The loss is therefore the mean quadratic entropy. Unlike that of Shannon entropy, its gradient is
bounded for unsure samples, and it vanishes for confident ones. ``balanced=True`` divides each row
of R by its sum and averages the mass off the diagonal over classes, in the spirit of minimum class
confusion; that depends on how often classes are predicted. The trained parameters, the rates and
the prediction, which comes before the update, are TENT's, by our own choice. On the bundled
BatchNorm classifier and a continual stream these rates are too high and the method collapses (72 %
error against 49 % of the source model, on 15 corruptions of 200 images at severity 5), as TENT does
on ``alpha_bn``; at 1e-4 it does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tta.core.config import CIFAR_ADAM, UpdateConfig
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.update import Update
from tta.parts.losses import class_correlation

__all__ = ["Core", "CoreConfig"]


@dataclass(frozen=True, kw_only=True)
class CoreConfig(UpdateConfig):
    """Fields of ``core``."""

    balanced: bool = False  # rows of R sum to 1, every class counts alike


@register("core")
class Core(Update):
    """Less correlation between classes, with alpha-BN's statistics."""

    Config = CoreConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"lr": 2.5e-4, "lr_scaling": "linear_below"},
        "cifar10": CIFAR_ADAM,
        "cifar100": CIFAR_ADAM,
    }
    default_norm: ClassVar[str | None] = "alpha_bn"

    def adapt(self, x: Tensor) -> Prediction:
        """Predict, then one step on the correlation between classes."""
        prediction = self.network(x)
        loss = class_correlation(prediction.logits, self.config.balanced)
        self.report = Report(selected=len(x), loss=loss.detach(), stepped=self.step(loss))
        return prediction
