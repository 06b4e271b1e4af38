"""SANTA: the source model as anchor, and contrast of features with source prototypes.

Chakrabarty, Sreenivas, Biswas: SANTA: Source Anchoring Network and Target Alignment for Continual
Test Time Adaptation, TMLR 2023; it builds on RMT (Döbler et al., CVPR 2023, arXiv 2211.13081).

RMT without a mean teacher: no second network is averaged and no source images are replayed. The
model agrees with the source model, which sees the same batch under batch statistics, and features
of an image, of an augmented view of it and the nearest source prototype are pulled together and all
else apart. The returned logits are those before the update.

    L = l_st mean_b - sum_k (p_bk + p'_bk) / 2 log s_bk + l_con L_con

p is the prediction for the image, p' that for its view, s the source's for the image; gradients
flow into p and p', while the anchor stands inside the logarithm, which is not the usual direction.
L_con is RMT's, with its projector, which starts at random and is trained too: 3B anchors, cosines
divided by T. All forward passes are separate, each with its own batch statistics. Prototypes are
class means of source features under batch statistics, as for ``rmt``; a class without images has
none and is never the nearest. ``draws=`` is asked for ``projector_init/0.weight`` and so on, at
wrap; ``reset`` goes back to the projector of the start.

The presets are the mariodoebler repository's, which this follows. It does not scale the rate; below
the batch size of the preset it falls with ``wrap(batch_size=)`` here (``lr_scaling="none"`` is
theirs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, number, whole_number
from tta.core.component import Context
from tta.core.config import CIFAR_ADAM, UpdateConfig
from tta.core.norm_layers import frozen_statistics
from tta.core.prediction import Prediction, Report
from tta.core.random import fork
from tta.core.registry import register
from tta.core.source import SourceStatistics
from tta.core.update import Update
from tta.parts.augment import Augmenter
from tta.parts.losses import soft_cross_entropy
from tta.parts.prototypes import fill_prototypes, make_projector, prototype_contrast, undefined
from tta.parts.teachers import OtherWeights

__all__ = ["Santa", "SantaConfig"]


@dataclass(frozen=True, kw_only=True)
class SantaConfig(UpdateConfig):
    """Fields of ``santa``."""

    lr: float = 0.01  # learning rate
    nesterov: bool = True  # SGD only
    weight_self_training: float = 1.0  # lambda of the agreement with the source
    weight_contrastive: float = 1.0  # lambda of the contrastive loss
    temperature: float = 0.1  # T of the contrastive loss
    projection_dim: int = 128  # width of the projector; 0 = no projector

    def __post_init__(self) -> None:
        super().__post_init__()
        number("weight_self_training", self.weight_self_training, 0, LARGE)
        number("weight_contrastive", self.weight_contrastive, 0, LARGE)
        number("temperature", self.temperature, 0, LARGE, above=True)
        whole_number("projection_dim", self.projection_dim, 0, 2**16)


_RATE = {"lr": 0.01, "lr_scaling": "linear_below"}


@register("santa")
class Santa(Update):
    """Agreement with the source, and contrast with its class prototypes."""

    Config = SantaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": _RATE,
        "cifar10": CIFAR_ADAM | {"nesterov": False},
        "cifar100": CIFAR_ADAM | {"nesterov": False},
        "domainnet126": _RATE | {"lr_batch_size": 128, "projection_dim": 0},
    }
    needs_features = True
    injects: ClassVar[tuple[str, ...]] = ("augment",)
    takes_draws: ClassVar[bool] = True
    cost: ClassVar[float] = 6.0

    prototypes: Tensor  # (C, D), NaN for a class without images

    def __init__(self, config: SantaConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        device = next(iter(context.parameters.values())).device
        self.anchor = OtherWeights(network, context.parameters, constant=True)
        self.augmenter = Augmenter(network.model, context)
        self.projector = make_projector(context, config.projection_dim, device)
        self.optimizer = self._make_optimizer()  # again, now with the projector
        self.register_buffer("prototypes", undefined(context), persistent=False)

    def adapt(self, x: Tensor) -> Prediction:
        """Predict, then one step on agreement with the source and contrast."""
        config = self.config
        self.augmenter.check(x)
        student = self.network(x)
        (view,) = self.augmenter.views(x, 1, fork(self.context.generator, x.device))
        with frozen_statistics(self.network.wrappers):
            augmented = self.network(view)
        anchor = self.anchor.predict(x).logits
        plain, other = (soft_cross_entropy(anchor, p.logits) for p in (student, augmented))
        training = (plain + other).mean() / 2
        contrast = prototype_contrast(
            self.projector, self.prototypes, student, augmented, config.temperature
        )
        loss = config.weight_self_training * training + config.weight_contrastive * contrast
        self.report = Report(
            selected=len(x), self_training=training.detach(), contrastive=contrast.detach()
        )
        self.report |= {"loss": loss.detach(), "stepped": self.step(loss)}
        return student

    def fit(self, source: SourceStatistics) -> None:
        """Take or make the prototypes.

        Raises:
            ValueError: When ``source`` has neither prototypes nor batches.
        """
        self.source_used = fill_prototypes(self.prototypes, source, self.network, self.name)

    def source_artefacts(self) -> dict[str, Any]:
        """The prototypes."""
        return {"prototypes": self.prototypes}
