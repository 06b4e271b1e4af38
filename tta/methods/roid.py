"""ROID: certain and diverse samples, weights kept near the source, predictions with their prior.

Marsden, Döbler, Yang: Universal Test-time Adaptation through Weight Ensembling, Diversity
Weighting, and Prior Correction, WACV 2024, arXiv 2306.00650.

Samples count by how sure the model is of them and by how much they differ from what it has
predicted lately; the soft likelihood ratio keeps a gradient where the model is sure, where entropy
has none, and a symmetric cross-entropy asks for the same prediction on an augmented view. After
every step the weights are drawn back to the source's a little, and what is returned is corrected
for the share of classes in the batch.

    div_b = 1 - cos(q, p_b),   cert_b = -H_b,   both scaled to [0, 1] within the batch
    w_b = exp(div_b cert_b / T),   0 where div_b < mean div;   then q <- 0.9 q + 0.1 mean_b p_b
    L = 1/B sum_{w_b > 0} w_b (SLR(z_b) + SCE(f(A(x_b)), z_b))
    theta <- s theta + (1 - s) theta_0

SLR(z) = -sum_k p_k log(p_k / (1 - p_k) + 1e-5), p clipped at 0.99. The views are made of the kept
samples alone, which are a batch with statistics of their own, and gradients flow into z_b too. A is
CoTTA's augmentation with reflected borders and without blur and noise. B is ``wrap(batch_size=)``,
since the authors divide by the batch size of their configuration even for a short last batch;
without that argument it is the batch's own length. q starts uniform and ``reset`` makes it so
again. z_b are the logits of the forward pass before the update.

The correction is an output rule of its own, ``prior_correction``, which this update brings and
which goes with any other; ``output="source"`` leaves it out. It multiplies *logits* by the smoothed
prior, as the authors' code does:

    z_bk (m_k + e) / (1 + e C),   m = mean_b p_b,   e = max(1/B, 1/C) / max_k m_k

with B the length of the batch at hand. Differences: one image, or several that are equal in
diversity or certainty, would give 0/0 in the scaling; here they get 0. The authors' switch for the
weighting is left out (together with the consistency loss it crashes their code), their switch for
that loss is ``consistency``. Pixels are clipped to [0, 1] before a view is made (and before
``augment=``), where the authors clip the view alone. Equation numbers are not given: this follows a
description of the authors' code, and its traces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tta.core.checks import fraction
from tta.core.config import CIFAR_ADAM, ComponentConfig
from tta.core.output_rule import Output
from tta.core.prediction import Prediction
from tta.core.registry import register
from tta.core.tracing import count_rows, is_tracing
from tta.methods._certain_diverse import (
    CertainDiverseConfig,
    CertainDiverseUpdate,
    sample_weights,
)
from tta.parts.teachers import ensemble

__all__ = ["PriorCorrection", "PriorCorrectionConfig", "Roid", "RoidConfig", "sample_weights"]


@dataclass(frozen=True, kw_only=True)
class RoidConfig(CertainDiverseConfig):
    """Fields of ``roid``."""

    source_momentum: float = 0.99  # s, share of the weights that stays

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("source_momentum", self.source_momentum)


@register("roid")
class Roid(CertainDiverseUpdate):
    """Certain and diverse samples, a soft likelihood ratio, weights kept near the source."""

    Config = RoidConfig
    in_sets: ClassVar[bool] = True
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"lr": 2.5e-4, "lr_scaling": "linear_below"},
        "cifar10": CIFAR_ADAM | {"nesterov": False},
        "cifar100": CIFAR_ADAM | {"nesterov": False},
    }

    def draw_back(self) -> None:
        """Pull the weights towards the source's."""
        parameters = self.parameters_adapted.values()
        ensemble(parameters, self.anchor.tensors(), 1 - self.config.source_momentum)


@dataclass(frozen=True, kw_only=True)
class PriorCorrectionConfig(ComponentConfig):
    """``prior_correction`` has no fields."""


@register("prior_correction")
class PriorCorrection(Output):
    """Logits times the smoothed share of each class in the batch."""

    Config = PriorCorrectionConfig
    harm: ClassVar[str] = "runs"

    def correct(self, prediction: Prediction) -> Tensor:
        """Return logits (B, C) times the smoothed prior."""
        logits = prediction.logits.float()
        classes = logits.shape[1]
        share = logits.softmax(1).mean(0)
        fewest = count_rows(logits)  # of images and classes
        fewest = fewest.clamp_max(classes) if is_tracing() else min(fewest, classes)
        smoothing = 1 / fewest / share.max()
        return logits * (share + smoothing) / (1 + smoothing * classes)
