"""TENT: entropy minimisation over the norm layers.

Wang, Shelhamer, Liu, Olshausen, Darrell: Tent: Fully Test-Time Adaptation by Entropy
Minimization, ICLR 2021, arXiv 2006.10726.

Confident predictions tend to be right, so the scale and shift of every norm layer are moved, batch
after batch, to make predictions confident; normalisation uses batch statistics. The returned
logits are those of the forward pass before the update. It is online: nothing is reset unless the
caller does so, and on long, sorted or small-batch streams it collapses, which is a property of the
method and not of this code.

    L = mean_b H(softmax(z_b)),   theta <- theta - lr dL/dtheta,   theta = norm weight and bias

The ``imagenet`` preset is that of the EATA and SAR repositories (TENT's own ImageNet code was never
released); ``cifar10`` is TENT's released recipe. All norm layers are trained, GroupNorm and
LayerNorm included, as in the SAR repository; TENT's own code knows only BatchNorm2d.

With ``loss="opinion"`` it is COME (Zhang et al., ICLR 2025, arXiv 2410.10894): the entropy is that
of an opinion with a mass exp(z_k) for each class and a mass K for "I do not know", and no gradient
runs along the logits, which therefore do not grow with confidence. K is ``opinion_classes``; the
authors have 1,000 for every model, which ``come_imagenet`` and ``come_imagenet_vit`` say too, and
None is the model's number of classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tta.core.config import CIFAR_ADAM
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.update import Update
from tta.methods._uncertainty import COME, UncertaintyConfig, uncertainty

__all__ = ["Tent", "TentConfig"]


@dataclass(frozen=True, kw_only=True)
class TentConfig(UncertaintyConfig):
    """Fields of ``tent``: those of every gradient method, and which entropy it minimises."""


_RESNET = {"lr": 2.5e-4, "lr_scaling": "small_batch"}
_VIT = {"lr": 1e-3, "lr_scaling": "linear"}


@register("tent")
class Tent(Update):
    """Entropy minimisation."""

    Config = TentConfig
    in_sets: ClassVar[bool] = True
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": _RESNET,
        "imagenet_vit": _VIT,
        "come_imagenet": _RESNET | COME,
        "come_imagenet_vit": _VIT | COME,
        "cifar10": CIFAR_ADAM,
        "cifar100": CIFAR_ADAM,
    }

    def adapt(self, x: Tensor) -> Prediction:
        """Predict, then one step on the mean entropy of the batch."""
        prediction = self.network(x)
        loss = uncertainty(self.config, self.context.num_classes)(prediction.logits).mean()
        self.report = Report(selected=len(x), loss=loss.detach(), stepped=self.step(loss))
        return prediction
