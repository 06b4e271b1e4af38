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

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, fraction, number
from tta.core.component import Context
from tta.core.config import CIFAR_ADAM, ComponentConfig, UpdateConfig
from tta.core.norm_layers import frozen_statistics
from tta.core.output_rule import Output
from tta.core.prediction import Prediction, Report
from tta.core.random import fork
from tta.core.registry import register
from tta.core.update import Update
from tta.parts.augment import Augmenter
from tta.parts.losses import entropy, soft_likelihood_ratio, symmetric_cross_entropy
from tta.parts.selection import move_average
from tta.parts.teachers import NamedTensors, ensemble

__all__ = ["PriorCorrection", "PriorCorrectionConfig", "Roid", "RoidConfig", "sample_weights"]


@dataclass(frozen=True, kw_only=True)
class RoidConfig(UpdateConfig):
    """Fields of ``roid``."""

    nesterov: bool = True  # SGD only
    temperature: float = 1 / 3  # T of the weights
    probs_momentum: float = 0.9  # share of the old q that stays
    source_momentum: float = 0.99  # s, share of the weights that stays
    consistency: bool = True  # the second loss; without it no mean= and std= are needed

    def __post_init__(self) -> None:
        super().__post_init__()
        number("temperature", self.temperature, 0, LARGE, above=True)
        fraction("probs_momentum", self.probs_momentum)
        fraction("source_momentum", self.source_momentum)


def sample_weights(logits: Tensor, average: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Weigh the samples of a batch by certainty and diversity.

    Args:
        logits: (B, C).
        average: q (C,).
        temperature: T.

    Returns:
        Weights (B,) in [1, exp(1 / T)], and which samples (B,) are kept.

    Example:
        >>> weights, kept = sample_weights(torch.zeros(1, 4), torch.full((4,), 0.25), 1 / 3)
        >>> weights, kept
        (tensor([1.]), tensor([True]))
    """
    diversity = _scaled(1 - F.cosine_similarity(average[None], logits.float().softmax(1), dim=1))
    certainty = _scaled(-entropy(logits))
    return torch.exp(diversity * certainty / temperature), diversity >= diversity.mean()


def _scaled(values: Tensor) -> Tensor:
    """Scale values linearly to [0, 1]; all are 0 where all are equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low) if bool(high > low) else torch.zeros_like(values)


@register("roid")
class Roid(Update):
    """Certain and diverse samples, a soft likelihood ratio, weights kept near the source."""

    Config = RoidConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"lr": 2.5e-4, "lr_scaling": "linear_below"},
        "cifar10": CIFAR_ADAM | {"nesterov": False},
        "cifar100": CIFAR_ADAM | {"nesterov": False},
    }
    default_output: ClassVar[str | None] = "prior_correction"
    injects: ClassVar[tuple[str, ...]] = ("augment",)
    learns_from_whole_batch: ClassVar[bool] = False

    ema_probs: Tensor  # q (C,)

    def __init__(self, config: RoidConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        classes = context.num_classes
        self.register_buffer("ema_probs", torch.full((classes,), 1 / classes, dtype=torch.float32))
        self.anchor = NamedTensors(
            {n: p.detach() for n, p in context.parameters.items()}, constant=True
        )
        self.augmenter: Augmenter | None = None
        if config.consistency:
            self.augmenter = Augmenter(network.model, context, padding="reflect", soften=False)

    def adapt(self, x: Tensor) -> Prediction:
        """Predict, weigh, step on both losses, draw back to the source."""
        config = self.config
        if self.augmenter is not None:
            self.augmenter.check(x)
        selection = self.selection_pass(x)
        logits = selection.logits
        weights, kept = sample_weights(logits, self.ema_probs, config.temperature)
        selection.keep(kept)
        chosen = selection.kept_logits()
        losses = soft_likelihood_ratio(chosen)
        self.report = Report(selected=len(chosen), kept=kept, likelihood_ratio=_mean(losses))
        if self.augmenter is not None:
            agreement = symmetric_cross_entropy(self._logits_of_view(x[kept]), chosen)
            losses = losses + agreement
            self.report["consistency"] = _mean(agreement)
        loss = (weights[kept] * losses).sum() / (self.context.batch_size or len(x))
        move_average(self.ema_probs, logits.float().softmax(1).mean(0), config.probs_momentum)
        stepped = self.step(loss)
        if stepped:
            parameters = self.parameters_adapted.values()
            ensemble(parameters, self.anchor.tensors(), 1 - config.source_momentum)
        self.report |= {"loss": loss.detach(), "stepped": stepped}
        return selection.prediction

    def _logits_of_view(self, images: Tensor) -> Tensor:
        """Logits (N, C) of one augmented view, in a pass of its own."""
        assert self.augmenter is not None
        (view,) = self.augmenter.views(images, 1, fork(self.context.generator, images.device))
        with frozen_statistics(self.network.wrappers):
            return self.network(view).logits


def _mean(losses: Tensor) -> Tensor:
    return losses.detach().mean()


@dataclass(frozen=True, kw_only=True)
class PriorCorrectionConfig(ComponentConfig):
    """``prior_correction`` has no fields."""


@register("prior_correction")
class PriorCorrection(Output):
    """Logits times the smoothed share of each class in the batch."""

    Config = PriorCorrectionConfig

    def correct(self, prediction: Prediction) -> Tensor:
        """Return logits (B, C) times the smoothed prior."""
        logits = prediction.logits.float()
        samples, classes = logits.shape
        share = logits.softmax(1).mean(0)
        smoothing = max(1 / samples, 1 / classes) / share.max()
        return logits * (share + smoothing) / (1 + smoothing * classes)
