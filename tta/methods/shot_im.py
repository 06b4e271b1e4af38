"""SHOT-IM: certain predictions of each image, and diverse ones over a batch.

Liang, Hu, Feng: Do We Really Need to Access the Source Data? Source Hypothesis Transfer for
Unsupervised Domain Adaptation, ICML 2020, arXiv 2002.08546; online as in the repository of T3A
(Iwasawa, Matsuo, NeurIPS 2021).

The linear layer stays as the source has made it, and everything before it is trained so that the
features suit it: low entropy for each image and high entropy for the mean prediction of a batch,
without which one class would do. Statistics are the running ones. The returned logits are those of
the last forward pass, before its step.

    L = mean_b H(p_b) + sum_k m_k log(m_k + 1e-5) + t mean_{max p_b > beta} CE(argmax p_b -> z_b)

with m the mean of p_b. ``pseudo_weight`` is t: 0 for SHOT-IM, 0.1 for SHOT as that repository has
it (the preset ``pseudo``), whose labels are those of the moment; the centroids of the paper's
offline training are not here. Where no image is confident, the last term is 0 (0/0 in that
repository, which makes its weights NaN).

There the optimiser is Adam at the source's own learning rate, or a tenth or ten times of it, with
one or three steps a batch. No rate can be right for every source; 5e-5 is ours. Where it is unknown
what makes the logits (``features=`` is a function), all parameters are trained. For one image the
two terms cancel but for the 1e-5, and Adam would make whole steps of what is left: nothing is
learned from one image without a confident label, unless ``official=True``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from tta.core.checks import LARGE, fraction, number
from tta.core.config import UpdateConfig
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.update import Update
from tta.parts.losses import entropy

__all__ = ["ShotIm", "ShotImConfig", "information_loss"]

EPS = 1e-5  # added to the mean prediction in its logarithm


@dataclass(frozen=True, kw_only=True)
class ShotImConfig(UpdateConfig):
    """Fields of ``shot_im``."""

    lr: float = 5e-5  # learning rate
    optimizer: str = "adam"  # "sgd", "adam" or "adamw"
    params: str = "body"  # what is trained: all but what makes the logits
    pseudo_weight: float = 0.0  # t of the loss on confident labels; 0 = without it
    pseudo_threshold: float = 0.9  # beta, smallest probability of a confident label, strict

    def __post_init__(self) -> None:
        super().__post_init__()
        number("pseudo_weight", self.pseudo_weight, 0, LARGE)
        fraction("pseudo_threshold", self.pseudo_threshold)


def information_loss(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions less the entropy of their mean.

    Args:
        logits: (B, C).

    Returns:
        A scalar in [-ln C, ln C] nats, but for 1e-5 that is added to the mean's probabilities.

    Example:
        >>> import torch
        >>> opposite = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
        >>> round(float(information_loss(opposite)), 3)  # -ln 2
        -0.693
    """
    mean = logits.float().softmax(1).mean(0)
    return entropy(logits).mean() + (mean * (mean + EPS).log()).sum()


@register("shot_im")
class ShotIm(Update):
    """Certain predictions that differ within a batch, by all layers but the last."""

    Config = ShotImConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "pseudo": {"pseudo_weight": 0.1, "lr_scaling": "linear_below"},
    }
    default_norm: ClassVar[str | None] = None

    def adapt(self, x: Tensor) -> Prediction:
        """Predict, then one step on certainty, diversity and confident labels."""
        config = self.config
        prediction = self.network(x)
        logits = prediction.logits.float()
        loss = information_loss(logits)
        highest, labels = logits.detach().softmax(1).max(1)
        confident = highest > config.pseudo_threshold
        count = confident.sum()
        if config.pseudo_weight > 0:
            losses = F.cross_entropy(logits, labels, reduction="none") * confident
            loss = loss + config.pseudo_weight * losses.sum() / count.clamp_min(1)
        pseudo = config.pseudo_weight > 0 and bool(count > 0)
        learns = len(x) > 1 or pseudo or config.official
        self.report = Report(selected=0, confident=count, loss=math.nan, stepped=False)
        if learns:
            self.report |= {"selected": len(x), "loss": loss.detach(), "stepped": self.step(loss)}
        return prediction
