"""RPL: robust pseudo-labels, by a loss that bounds what a wrong label can do.

Rusak, Schneider, Pachitariu, Eck, Gehler, Bringmann, Brendel, Bethge: If your data distribution
shifts, use self-learning, TMLR 2022, arXiv 2104.12928.

TENT with another loss: the model learns its own labels by the generalised cross-entropy, which lies
between cross-entropy (q near 0) and the mean absolute error (q = 1). Samples of which the model is
unsure, whose labels are often wrong, then move it less than cross-entropy would let them.
Normalisation uses batch statistics, and the returned logits are those before the update.

    L = mean_b (1 - p_b[y_b]^q) / q,   y_b = argmax_k p_b[k],   theta = norm weight and bias

No sample is left out. The paper's teacher, from which labels come at intervals, belongs to its
runs over whole data sets; online the labels are those of the moment, as in the mariodoebler
repository, whose settings the presets are. It does not scale the rate; below the batch size of the
preset it falls with ``wrap(batch_size=)`` here (``lr_scaling="none"`` is theirs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from tta.core.checks import LARGE, number
from tta.core.config import CIFAR_ADAM, UpdateConfig
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.update import Update

__all__ = ["Rpl", "RplConfig", "generalized_cross_entropy"]


@dataclass(frozen=True, kw_only=True)
class RplConfig(UpdateConfig):
    """Fields of ``rpl``."""

    nesterov: bool = True  # SGD only
    q: float = 0.8  # of the loss, above 0; the smaller, the more unsure samples count

    def __post_init__(self) -> None:
        super().__post_init__()
        number("q", self.q, 0, LARGE, above=True)


def generalized_cross_entropy(logits: Tensor, q: float) -> Tensor:
    """``(1 - p_y^q) / q`` for the most probable class y.

    Args:
        logits: (B, C).
        q: Above 0.

    Returns:
        (B,), each in [0, 1 / q).

    Example:
        >>> import torch
        >>> generalized_cross_entropy(torch.zeros(1, 4), 0.5)  # (1 - 1/2) / (1/2)
        tensor([1.])
    """
    log_probs = F.log_softmax(logits.float(), 1)
    return -(q * log_probs.max(1).values).expm1() / q


@register("rpl")
class Rpl(Update):
    """Generalised cross-entropy on the model's own labels."""

    Config = RplConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"lr": 5e-4, "lr_scaling": "linear_below"},
        "cifar10": CIFAR_ADAM | {"nesterov": False},
        "cifar100": CIFAR_ADAM | {"nesterov": False},
    }

    def adapt(self, x: Tensor) -> Prediction:
        """Predict, then one step on the own labels."""
        prediction = self.network(x)
        loss = generalized_cross_entropy(prediction.logits, self.config.q).mean()
        self.report = Report(selected=len(x), loss=loss.detach(), stepped=self.step(loss))
        return prediction
